"""What takes the steps of a run on one rank: method, optimizer and schedule, as configured, and
how delivered rows become its inputs."""

from typing import Any

import torch
from torch import Tensor, nn

from data.schema import Manifest, Modality
from service.config import ConfigError, RunConfig
from training.augment import RowSpec
from training.clock import Clock
from training.distributed import data_parallel, from_ranks
from training.encoders import build_model
from training.methods import build_method
from training.methods.base import Method
from training.modality import ModalitySpec
from training.optim import build_optimizer, build_schedule
from training.precision import Precision, best_precision


def make_method(config: RunConfig, manifest: Manifest) -> Method:
    """The model, initialised from the training seed, inside its method.

    Raises:
        ConfigError: model or method settings do not fit the data set.
    """
    parts = [
        ModalitySpec(m.name, m.kind, m.shape, m.pad, m.vocab_size) for m in manifest.modalities
    ]
    try:
        model = build_model(config.model, parts, len(manifest.classes), config.train.seed)
        return build_method(config.method, model, config.method_sections)
    except ValueError as error:  # settings that do not fit this data set
        raise ConfigError(str(error)) from error


def row_spec(modality: Modality, config: RunConfig) -> RowSpec | None:
    """How delivered rows become the model's inputs; None for those that are it already."""
    changes = config.augment.get(modality.name)
    random = modality.augment.model_dump()
    if changes is not None:
        random |= changes.model_dump(exclude_none=True)
    if modality.kind in ("text", "vector", "sequence"):
        return None
    return RowSpec(
        kind=modality.kind,
        shape=modality.shape,
        mean=modality.mean,
        std=modality.std,
        scale=modality.scale,
        time_axis=modality.time_axis,
        **random,
    )


class Stepper:
    """Method, optimizer and schedule on a device; all ranks make one together.

    Raises:
        ConfigError: see `make_method`.
    """

    def __init__(self, config: RunConfig, manifest: Manifest, device: torch.device):
        torch.backends.cudnn.benchmark = not config.train.deterministic
        self.device = device
        self.method = make_method(config, manifest).to(device)
        self._train = config.train
        self.method.use(self._precision())
        self.method.micro_batches = config.train.micro_batches
        self.method.clock = Clock(device)
        if config.train.compile:
            self.method.model.compile_encoders()
        self.optimizer = build_optimizer(config.optim, self.method)
        self.schedule = build_schedule(config.optim, self.optimizer, config.warmup_epochs)
        groups = self.optimizer.param_groups
        self._configured = [{k: v for k, v in g.items() if k != "params"} for g in groups]

    @property
    def precision(self) -> Precision:
        """Of the arithmetic inside encoders."""
        return self.method.model.precision

    def _precision(self) -> Precision:
        """The one that is set, or the best that all ranks are good at."""
        if self._train.precision != "auto":
            return self._train.precision
        best = set(from_ranks(best_precision(self.device, self.method.model)))
        return best.pop() if len(best) == 1 else "fp32"

    def keep_precision(self, notes: dict[str, Any]) -> None:
        """Take the precision of a checkpoint's notes: a run goes on, and is evaluated, as it began,
        on whatever machine."""
        if self._train.precision == "auto":
            self.method.model.precision = notes["precision"]

    def retune(self) -> None:
        """Give the optimizer the configured learning rate and the like, where a checkpoint brought
        those of another configuration. The schedule goes on where it is."""
        self.schedule.base_lrs = [own["initial_lr"] for own in self._configured]
        factors = [factor(self.schedule.last_epoch) for factor in self.schedule.lr_lambdas]
        for group, own, factor in zip(
            self.optimizer.param_groups, self._configured, factors, strict=True
        ):
            group |= own | {"lr": own["initial_lr"] * factor}

    def widen(self) -> None:
        """Go on in double precision from single-precision state."""
        self.method.use("fp64")
        for state in self.optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    state[name] = value.double()

    def wrap(self, method: Method) -> nn.Module:
        """The method inside DDP, if there are other ranks."""
        return data_parallel(
            method,
            in_rank_order=self._train.deterministic,
            compression=self._train.gradient_compression,
            launched=lambda: method.clock.mark("backward"),
        )
