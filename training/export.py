"""A trained method as one graph of torch.export: delivered rows in, probabilities out, no Python.

Shapes: B rows, C classes, M modalities.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export, load, save

from training.augment import RowSpec, gain_and_shift
from training.methods.base import Method, wide

EXAMPLE_ROWS = 3
PARITY_ROWS = (1, 2, 7, 64)


class Deployed(nn.Module):
    """What a method predicts, from rows as they are delivered for evaluation.

    Args:
        method: in eval mode, in fp32.
        specs: modality -> how rows are normalised; None: used as they are.
    """

    def __init__(self, method: Method, specs: Mapping[str, RowSpec | None]):
        super().__init__()
        self.method = method
        self._normalised = [name for name, spec in specs.items() if spec and spec.mean]
        for number, name in enumerate(self._normalised):
            spec = specs[name]
            assert spec
            gain, shift = gain_and_shift(spec.mean, spec.std, spec.scale, torch.device("cpu"))
            self.register_buffer(f"gain_{number}", gain.clone())
            self.register_buffer(f"shift_{number}", shift.clone())

    def forward(self, rows: dict[str, Tensor], present: Tensor | None = None) -> dict[str, Tensor]:
        """Probabilities, (B, C) each: "fused", and one entry per modality.

        Args:
            rows: modality -> (B, *shape).
            present: (B, M) bool, which modalities the rows have; None: all.
        """
        inputs = dict(rows)
        for number, name in enumerate(self._normalised):
            gain, shift = getattr(self, f"gain_{number}"), getattr(self, f"shift_{number}")
            inputs[name] = rows[name] * gain + shift
        logits = self.method.predict(self.method.model.encode(inputs, present))
        return {name: wide(value).softmax(dim=1).float() for name, value in logits.items()}


def exported(model: Deployed, rows: dict[str, Tensor], present: Tensor | None) -> ExportedProgram:
    """The graph for any number of rows; `rows` are EXAMPLE_ROWS or so, not 0 or 1."""
    shapes: dict[str, object] = {"rows": {name: {0: Dim.DYNAMIC} for name in rows}}
    if present is not None:
        shapes["present"] = {0: Dim.DYNAMIC}
    with torch.no_grad():
        program = export(model, _arguments(rows, present), dynamic_shapes=shapes)
    program.example_inputs = None  # they would be the only pickle in the file
    return program


def write(program: ExportedProgram, path: Path, notes: Mapping[str, str]) -> None:
    """Save a graph; `notes` are text files in it."""
    with warnings.catch_warnings():  # of weights on other devices, and there are none
        warnings.simplefilter("ignore", UserWarning)
        save(program, path, extra_files=dict(notes))


def difference(
    path: Path, model: Deployed, rows: dict[str, Tensor], present: Tensor | None
) -> float:
    """Largest difference of any probability between a file's graph and the model itself, over
    batches of PARITY_ROWS rows cut from `rows`."""
    with warnings.catch_warnings():  # of read-only memory, which nobody writes
        warnings.simplefilter("ignore", UserWarning)
        program, largest = load(path).module(), 0.0
    for count in PARITY_ROWS:
        part = {name: value[:count] for name, value in rows.items()}
        given = _arguments(part, None if present is None else present[:count])
        with torch.no_grad():
            ours, theirs = model(*given), program(*given)
        gaps = [float((ours[name] - theirs[name]).abs().max()) for name in ours]
        largest = max(largest, *gaps)
    return largest


def _arguments(
    rows: dict[str, Tensor], present: Tensor | None
) -> tuple[dict[str, Tensor]] | tuple[dict[str, Tensor], Tensor]:
    """What the graph is called with: no `present` where it was traced without."""
    return (rows,) if present is None else (rows, present)
