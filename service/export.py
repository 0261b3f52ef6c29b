"""`midas export`: a trained model as a file of torch.export, checked against the model itself."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.schema import MANIFEST_NAME, Manifest, Modality
from service import models
from service.config import ConfigError
from service.served import Served
from training import export as graphs

TOLERANCE = 1e-5
SEED = 0


def export(model: str, output: str, storage: str) -> dict[str, Any]:
    """Write a model's graph; the file appears only if it says what the model says.

    The graph computes in fp32, also for a run in half precision.

    Args:
        model: a run, or models:/NAME@ALIAS.
        output: file, replaced.

    Returns:
        `export/max_difference` of probabilities, over made-up rows in batches of several sizes.

    Raises:
        ConfigError: there is no such model, or torch cannot export it faithfully.
    """
    target = Path(output).expanduser().absolute()
    if not target.parent.is_dir():
        raise ConfigError(f"--output {output}: {target.parent} is not a folder; make it first")
    found = models.find(model, storage)
    served = Served(found.files, found.where, "cpu")
    served.method.model.precision = "fp32"
    deployed = graphs.Deployed(served.method.float(), served.specs).eval()
    rows, present = _rows(served.manifest)
    few = {name: value[: graphs.EXAMPLE_ROWS] for name, value in rows.items()}
    notes = {
        MANIFEST_NAME: found.files[MANIFEST_NAME].decode(),
        "classes.json": json.dumps(served.manifest.classes),
    }
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        part = Path(scratch) / "model.pt2"
        try:
            program = graphs.exported(
                deployed, few, None if present is None else present[: graphs.EXAMPLE_ROWS]
            )
        except Exception as error:  # torch raises all kinds, for whatever a network does
            first = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"torch.export cannot trace the encoders of {found.where}: {first}; use "
                "`midas predict`, or encoders other than pretrained ones"
            ) from error
        graphs.write(program, part, notes)
        gap = graphs.difference(part, deployed, rows, present)
        if not gap <= TOLERANCE:
            raise ConfigError(
                f"the graph of {found.where} differs from the model by {gap:.2e} in a probability, "
                f"at most {TOLERANCE:g} is allowed; nothing is written; use `midas predict`"
            )
        part.replace(target)
    return {
        "output": str(target),
        "model": found.where,
        "bytes": target.stat().st_size,
        "export/max_difference": gap,
        "export/batches": ", ".join(map(str, graphs.PARITY_ROWS)),
    }


def _rows(manifest: Manifest) -> tuple[dict[str, Tensor], Tensor | None]:
    """Made-up rows of every modality, as many as the largest batch; and which of them are there."""
    count = max(graphs.PARITY_ROWS)
    generator = torch.Generator().manual_seed(SEED)
    rows = {m.name: _tensor(m, count, generator) for m in manifest.modalities}
    if not manifest.has_optional:
        return rows, None
    optional = torch.tensor([m.optional for m in manifest.modalities])
    drawn = torch.rand(count, len(manifest.modalities), generator=generator) < 0.5
    return rows, drawn | ~optional


def _tensor(modality: Modality, count: int, generator: torch.Generator) -> Tensor:
    shape, dtype = (count, *modality.shape), getattr(torch, modality.dtype)
    if modality.kind == "text":
        ids = torch.randint(0, modality.vocab_size, shape, generator=generator)
        ids[:, modality.shape[0] // 2 :] = modality.pad
        return ids.to(dtype)
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, generator=generator).to(dtype)
    values = torch.randn(shape, generator=generator)
    if modality.kind == "sequence":
        values[:, : modality.shape[0] // 2] = 0
    return values.to(dtype)
