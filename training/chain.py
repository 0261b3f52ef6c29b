"""The chain of steps: what every step was made of and what came out, so that runs can be compared.

A step's order digest identifies the rows of its global batch and their places in it; it is a sum
over rows, so ranks add their parts and the number of workers does not matter. A chain hashes the
records of all steps so far: two runs with equal heads took the same steps.
"""

import hashlib
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from training.batch import Batch

_MASK_32 = 0xFFFFFFFF


@dataclass(frozen=True)
class StepRecord:
    """One step of a run.

    Attributes:
        epoch: 0-based epoch.
        step: 0-based step inside the epoch.
        order: 16 hexadecimal digits, see `order_digest`.
        loss: mean training loss over the rows of the global batch.
        workers: ranks that took the step.
    """

    epoch: int
    step: int
    order: str
    loss: float
    workers: int = 1


@dataclass(frozen=True)
class Chain:
    """Heads of the two hash chains over all steps of a run so far, 32 hexadecimal digits each.

    `order` does not depend on the number of workers; `loss` has all bits of the losses, so it is
    equal only where every sum was taken in the same order.
    """

    order: str = ""
    loss: str = ""

    def extended(self, records: list[StepRecord]) -> "Chain":
        """The chain after these steps."""
        order, loss = self.order, self.loss
        for record in records:
            order = _link(order, f"{record.epoch}/{record.step}/{record.order}".encode())
            loss = _link(loss, struct.pack("<d", record.loss))
        return Chain(order, loss)


def order_digest(batch: Batch) -> Tensor:
    """(2,) float64, this rank's part of a 64-bit digest in halves; add over ranks.

    Every row is mixed with its lane and its place in the lane, which do not depend on the number
    of workers. A half is below 2^32 per row, so sums of up to 2^21 rows are exact.
    """
    place = torch.arange(len(batch.lane), device=batch.lane.device)
    place = place - torch.searchsorted(batch.lane.contiguous(), batch.lane)
    mixed = _mix(_mix(_mix(batch.sample_id) + batch.lane) + place)
    halves = torch.stack([mixed & _MASK_32, (mixed >> 32) & _MASK_32])
    return halves.double().sum(dim=1)


def order_text(digest: Tensor) -> str:
    """The 16 hexadecimal digits of a digest that was added over ranks."""
    low, high = (int(half) & _MASK_32 for half in digest.tolist())
    return f"{high:08x}{low:08x}"


def _mix(value: Tensor) -> Tensor:
    """Scatter int64 values over all 64 bits (the finaliser of splitmix64, wrapping around)."""
    value = value + -0x61C8864680B583EB
    value = (value ^ _shifted(value, 30)) * -0x40A7B892E31B1A47
    value = (value ^ _shifted(value, 27)) * -0x6B2FB644ECCEEE15
    return value ^ _shifted(value, 31)


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Shift right, filling with zeros."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _link(head: str, record: bytes) -> str:
    return hashlib.blake2b(bytes.fromhex(head) + record, digest_size=16).hexdigest()
