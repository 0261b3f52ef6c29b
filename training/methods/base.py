"""Method: what a balanced-learning method may change about training. The loop knows nothing else.

The loop runs, for every epoch,

    method.set_phase(epoch)                       freeze/unfreeze; a change makes the loop re-wrap
    method.before_epoch(data, progress)           passes over the data; may return a Resampling
    for batch in batches:
        sums = method.train_step(wrapped, batch, optimizer, progress)
    method.epoch_metrics(sums of the epoch)

and the default `train_step` is

    zero_grad -> wrapped(batch, progress) -> reduce sums, backward -> after_backward -> step
        -> after_step

`wrapped` is the method inside DDP (or the method itself when alone): everything that learns or
steers lives in it as a parameter or a buffer, and `state_dict()` is all a method has to save.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.batch import Batch, Progress, StepOutput
from training.clock import Clock
from training.distributed import PendingSums, without_exchange, world_size
from training.model import MultimodalModel
from training.precision import LossScale, Precision

IGNORED_LABEL = -100  # rows with it add nothing to torch's cross-entropy
# Sums of every step: whether the optimizer moved, and whether training cannot go on.
FINITE, HOPELESS = "finite", "hopeless"


class NonFiniteError(RuntimeError):
    """Loss or gradient is not finite; raised on every rank, and the optimizer has not moved.

    Args:
        loss: mean training loss of the step.
    """

    def __init__(self, loss: float):
        super().__init__(
            f"training loss is {loss:g}; loss and gradients must be finite on every rank, so "
            "the run stopped before the optimizer moved; look for NaN in the data "
            "(midas prepare reports rejected rows) or lower optim.lr"
        )


@dataclass(frozen=True)
class Resampling:
    """The rows of one epoch, in place of every row once; equal on every rank.

    Attributes:
        sample_id: (n,) int64, any order, repeats allowed.
        keep: (n, M) bool: modalities that stay; the batch carries it as `Batch.keep`, and the
            method's forward decides what dropping means.
    """

    sample_id: Tensor
    keep: Tensor


@dataclass(frozen=True)
class EpochData:
    """Fresh passes over this rank's rows, for prototypes, valuations and nested estimation."""

    train: Callable[[], Iterator[Batch]]
    val: Callable[[], Iterator[Batch]]


class Method(nn.Module):
    """A training method: owns the model, defines the loss, may act at the named points.

    Args:
        model: encoders, heads and fusion; method-specific modules are added in subclasses.
        warmup_epochs: epochs before the main phase; model selection ignores them.
    """

    def __init__(self, model: MultimodalModel, warmup_epochs: int = 0):
        super().__init__()
        self.model = model
        self.warmup_epochs = warmup_epochs
        self.micro_batches = 1
        self.clock = Clock()
        self.loss_scale: LossScale | None = None

    def use(self, precision: Precision) -> None:
        """Compute in this precision; to be called before the optimizer is made."""
        self.model.precision = precision
        device = next(self.parameters()).device
        self.loss_scale = LossScale().to(device) if precision == "fp16" else None
        if precision == "fp64":
            self.double()

    def is_main_phase(self, epoch: int) -> bool:
        """Whether `epoch` counts for model selection."""
        return epoch >= self.warmup_epochs

    def set_phase(self, epoch: int) -> None:
        """Set `requires_grad` for this epoch. Parameters that get no gradient must be frozen."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimizer parameter groups over all parameters that learn in any phase."""
        return [{"params": list(self.parameters())}]

    def before_epoch(self, data: EpochData, progress: Progress) -> Resampling | None:
        """Called before every epoch, outside DDP; update state (buffers) from reduced numbers.

        The place, too, for what others do at the end of an epoch (valuation, re-learning): the
        checkpoint then holds the weights that were validated, and a resumed run repeats it.
        """

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        """Loss and sums of one batch; runs inside DDP, once per step."""
        raise NotImplementedError

    def after_backward(self, sums: dict[str, Tensor], progress: Progress) -> None:
        """Gradients are averaged over ranks and `sums` are reduced: may rescale `p.grad`."""

    def after_step(self, sums: dict[str, Tensor], progress: Progress) -> None:
        """The optimizer has moved: update buffers from the reduced `sums`."""

    def predict(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Logits for evaluation: "fused" and one entry per modality, each (B, C).

        Args:
            features: modality -> (B, D_m), as from `model.encode`; absent modalities are zeros.
        """
        raise NotImplementedError

    def epoch_metrics(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Method's own metrics from the sums of all steps of an epoch (reduced, fp64)."""
        return {}

    def train_step(
        self, wrapped: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, progress: Progress
    ) -> dict[str, Tensor]:
        """One optimizer step; returns the reduced sums. Override only if one step is not enough.

        Raises:
            NonFiniteError: loss or gradient is not finite on some rank; nothing has moved.
        """
        optimizer.zero_grad(set_to_none=True)
        sums = self._gradients(wrapped, batch, progress)
        finite = self._unscale_and_check(sums)
        sums[FINITE] = finite.double()
        self.after_backward(sums, progress)
        _step_if(finite, optimizer)
        self.after_step(sums, progress)
        self.clock.mark("optimizer")
        return sums

    def _gradients(self, wrapped: nn.Module, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Accumulate gradients over micro-batches, averaged over ranks; returns reduced sums."""
        *earlier, last = batch.micro_batches(self.micro_batches)
        sums: dict[str, Tensor] = {}
        for place, part in enumerate(earlier):
            with without_exchange(wrapped):
                output: StepOutput = wrapped(part, replace(progress, part=place))
                self._loss(output, part, batch).backward()
            sums = _added(sums, output.sums)
        self.clock.mark("backward")
        output = wrapped(last, replace(progress, part=len(earlier)))
        self.clock.mark("forward")
        pending = PendingSums(_added(sums, output.sums))  # travels beside the backward pass
        self._loss(output, last, batch).backward()
        # DDP marks buckets of gradients when it sends them: the rest is waiting for other ranks.
        self.clock.mark("backward" if wrapped is self else "exchange")
        reduced = pending.wait()
        self.clock.mark("exchange")
        return reduced

    def _loss(self, output: StepOutput, part: Batch, batch: Batch) -> Tensor:
        """What to differentiate: the part's share of the batch's loss, scaled."""
        loss = output.loss * (part.global_rows / batch.global_rows)
        return loss if self.loss_scale is None else loss * self.loss_scale.factor

    def _unscale_and_check(self, sums: dict[str, Tensor]) -> Tensor:
        """(): whether the averaged gradients are finite and the optimizer may move.

        Raises:
            NonFiniteError: loss or gradient is not finite, which a smaller loss scale cannot mend.
                On a GPU, where asking would make the step wait, the caller has to ask FINITE.
        """
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        scale = self.loss_scale
        if scale is not None:
            torch._foreach_div_(grads, scale.factor)  # pyright: ignore[reportPrivateImportUsage]
        finite = torch.isfinite(nn.utils.get_total_norm(grads) + sums["loss_sum"])
        hopeless = ~finite
        if scale is not None:
            hopeless = ~torch.isfinite(sums["loss_sum"]) | (hopeless & (scale.factor <= 1))
            scale.update(finite)
        sums[HOPELESS] = hopeless.double()
        if finite.device.type == "cpu" and bool(hopeless):
            raise NonFiniteError(float(sums["loss_sum"] / sums["rows"].clamp_min(1)))
        return finite


def _added(sums: dict[str, Tensor], more: dict[str, Tensor]) -> dict[str, Tensor]:
    return sums | {name: sums[name] + v if name in sums else v for name, v in more.items()}


def _step_if(finite: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Move, unless gradients are not finite; fused optimizers read that on the device."""
    if finite.device.type != "cpu":
        optimizer.found_inf = (~finite).float()  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
    elif bool(finite):
        optimizer.step()


def global_mean(local_sum: Tensor, global_count: int | Tensor) -> Tensor:
    """`world_size * local_sum / global_count`: DDP's mean over ranks makes it the global mean."""
    return local_sum * world_size() / global_count


def wide(value: Tensor) -> Tensor:
    """At least float32: softmax, logarithms and sums are not taken in half precision."""
    return value if value.dtype == torch.float64 else value.float()


def cross_entropy_sum(logits_BC: Tensor, label_B: Tensor) -> Tensor:
    """Cross-entropy summed over rows, (), in at least float32."""
    return functional.cross_entropy(wide(logits_BC), label_B, reduction="sum")


def unimodal_losses(logits: dict[str, Tensor], batch: Batch) -> list[Tensor]:
    """Cross-entropy of every unimodal head, (), summed over the rows that have the modality.

    Methods divide it by all rows of the global batch: an absent modality adds nothing, a present
    one weighs the same in every batch, and no counts are exchanged.

    Args:
        logits: modality -> (B, C), in the order of the model.
        batch: labels, and which rows have what.
    """
    if batch.present is None:
        return [cross_entropy_sum(z, batch.label) for z in logits.values()]
    labels_BM = batch.label[:, None].where(batch.present, IGNORED_LABEL)
    return [cross_entropy_sum(z, labels_BM[:, m]) for m, z in enumerate(logits.values())]


def step_output(loss: Tensor, batch: Batch, **sums: Tensor) -> StepOutput:
    """StepOutput of a loss made of `global_mean` terms, with what the loop wants to be reduced too:
    `loss_sum`, `rows` and the numbers that the batch carries."""
    loss_sum = loss.detach() * (batch.global_rows / world_size())
    rows = torch.full_like(loss_sum, batch.label.shape[0])
    named = {name: value.detach() for name, value in sums.items()}
    return StepOutput(loss, {"loss_sum": loss_sum, "rows": rows, **named, **batch.carried})
