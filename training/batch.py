"""What flows between the loop, a method and the reader: Batch, Progress, StepOutput.

Shapes: B rows of this rank's part of the global batch, M modalities in the order of the model.
"""

import hashlib
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from training.delayed import sent
from training.distributed import rank, world_size


@dataclass(frozen=True)
class Batch:
    """This rank's part of one global batch; the parts of ranks 0..W-1, concatenated, are the batch.

    Attributes:
        inputs: modality name -> (B, ...) tensor, dtype as described by the manifest; rows that lack
            the modality hold any finite numbers.
        label: (B,) int64 class ids.
        sample_id: (B,) int64, unique in the data set.
        lane: (B,) int64, non-decreasing: the lane of the global order a row came from. Lanes do not
            depend on the number of workers, so whatever is grouped by lane does not either.
        num_lanes: number of lanes of the global order.
        global_rows: rows of the whole global batch, over all ranks.
        lane_rows: rows of every lane in the global batch, if the reader knows them: pairing and
            micro-batches then need not ask the other ranks, nor wait for the device.
        chunk: lane of all rows, of a chunk for evaluation whose reader knows it.
        keep: (B, M) bool, modalities that a `Resampling` keeps; None keeps all.
        present: (B, M) bool, modalities that a row has; None, on every rank, if all have all.
        carried: the loop's own numbers, added over ranks together with those of the method.
    """

    inputs: dict[str, Tensor]
    label: Tensor
    sample_id: Tensor
    lane: Tensor
    num_lanes: int
    global_rows: int
    keep: Tensor | None = None
    present: Tensor | None = None
    lane_rows: tuple[int, ...] | None = None
    chunk: int | None = None
    carried: dict[str, Tensor] = field(default_factory=dict)

    @property
    def complete(self) -> Tensor:
        """(B,) bool, rows that have all modalities."""
        if self.present is None:
            return torch.ones_like(self.label, dtype=torch.bool)
        return self.present.all(dim=1)

    def micro_batches(self, count: int) -> "list[Batch]":
        """The batch dealt to at most `count` smaller ones: row i of every lane goes to i mod count.

        Which rows are together does not depend on the number of ranks. Only the first carries the
        loop's numbers.
        """
        if count == 1:
            return [self]
        assert self.lane_rows is not None, "the reader of training rows gives them"
        own = slice(*(place * self.num_lanes // world_size() for place in (rank(), rank() + 1)))
        place = torch.cat([torch.arange(rows) for rows in self.lane_rows[own]])
        assert len(place) == len(self.label), "lanes are dealt to ranks in runs"
        parts = []
        for part in range(count):
            lane_rows = tuple(len(range(part, rows, count)) for rows in self.lane_rows)
            if sum(lane_rows):
                carried = self.carried if part == 0 else {}
                chosen = (place % count == part).nonzero().squeeze(1)
                rows = self.only(sent(chosen, self.label.device))
                parts.append(
                    replace(rows, global_rows=sum(lane_rows), lane_rows=lane_rows, carried=carried)
                )
        return parts

    def only(self, wanted: Tensor) -> "Batch":
        """The rows of a (B,) bool mask, or with these numbers; what is said of the global batch
        stays."""
        return replace(
            self,
            inputs={name: value[wanted] for name, value in self.inputs.items()},
            label=self.label[wanted],
            sample_id=self.sample_id[wanted],
            lane=self.lane[wanted],
            keep=None if self.keep is None else self.keep[wanted],
            present=None if self.present is None else self.present[wanted],
        )


@dataclass(frozen=True)
class Progress:
    """Where training stands; the only source of randomness in a step.

    Attributes:
        seed: training seed of the run.
        epoch: 0-based epoch.
        step: 0-based step inside the epoch.
        num_epochs: epochs of the whole run.
        part: 0-based micro-batch of the step.
    """

    seed: int
    epoch: int
    step: int
    num_epochs: int
    part: int = 0

    def stream_seed(self, *stream: int | str) -> int:
        """A 63-bit seed from (seed, epoch, step, part, *stream); equal on every rank."""
        part = (f"part {self.part}",) if self.part else ()
        text = repr((self.seed, self.epoch, self.step, *part, *stream)).encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1

    def generator(self, *stream: int | str, device: torch.device | str = "cpu") -> torch.Generator:
        """A generator seeded by (seed, epoch, step, *stream), on `device`."""
        return torch.Generator(device).manual_seed(self.stream_seed(*stream))


@dataclass
class StepOutput:
    """Result of one forward pass of a method; the same fields for every method.

    Attributes:
        loss: scalar. Every term is `world_size * local_sum / global_count`, so that the mean over
            ranks that DDP takes of the gradients is the gradient of the global mean.
        sums: name -> detached tensor of any shape, this rank's sums. The loop adds them over ranks
            once per step, in one fp64 all-reduce. `loss_sum` () and `rows` () are always there:
            mean training loss of the epoch is sum(loss_sum) / sum(rows).
    """

    loss: Tensor
    sums: dict[str, Tensor]
