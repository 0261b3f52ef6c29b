"""Who is paired with whom in MIDAS: per pair group, whichever ranks the rows of a group are on.

Shapes: R rows of this rank, G rows of the pool (the whole global batch, or this rank's rows if no
group leaves its rank), M modalities, J = M - 1 partners of a row, S misaligned samples built per
row, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from training.batch import Batch, Progress
from training.config import Orders, Pairing
from training.delayed import sent
from training.distributed import gather_rows, rank, reduce_sums, row_counts, world_size

UNPAIRED = -1


@dataclass(frozen=True)
class Pool:
    """The rows among which this rank's rows find their partners.

    Attributes:
        label_G: class ids.
        group_G: pair group; partners belong to one group. UNPAIRED for rows that lack a modality,
            which neither give nor take.
        own_R: where this rank's rows are.
        counts: rows of every rank, or None if the pool is this rank's rows.
        sizes: rows of every group from UNPAIRED on, if they are known without looking.
    """

    label_G: Tensor
    group_G: Tensor
    own_R: Tensor
    counts: list[int] | None
    sizes: list[int] | None = None

    def gather(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """This rank's (R, n, ...) tensors to (G, n, ...), by one collective; differentiable.

        Several tensors travel in the widest of their dtypes and agree in the shape after n.
        """
        if self.counts is None:
            return rows
        table = gather_rows(torch.cat(rows, dim=1), self.counts)
        parts = table.split([value.shape[1] for value in rows], dim=1)
        return tuple(part.to(value.dtype) for part, value in zip(parts, rows, strict=True))


@dataclass(frozen=True)
class Pairs:
    """Who supplies what to the misaligned samples of this rank's rows.

    Attributes:
        label_SRM: label of the row that supplies each modality.
        source_SRM: that row, as an index into the pool.
        slot_SRM: 0 where the row itself supplies the modality.
        valid_R: rows that found a partner.
        num_valid: (), such rows in the global batch.
        pool: where the sources are.
    """

    label_SRM: Tensor
    source_SRM: Tensor
    slot_SRM: Tensor
    valid_R: Tensor
    num_valid: Tensor
    pool: Pool


def make_pool(batch: Batch, pair_groups: int) -> Pool:
    """Labels and pair groups of the pool; lanes are dealt to groups like they are to ranks."""
    group = batch.lane * pair_groups // batch.num_lanes
    group = group.where(batch.complete, UNPAIRED)
    own_R = torch.arange(len(batch.label), device=batch.label.device)
    label, counts = batch.label, None
    if pair_groups % world_size() or batch.num_lanes % world_size():
        counts = _rows_of_ranks(batch)
        table = gather_rows(torch.stack([batch.label, group], dim=1), counts)
        label, group, own_R = table[:, 0], table[:, 1], own_R + sum(counts[: rank()])
    return Pool(label, group, own_R, counts, _group_sizes(batch, pair_groups, counts))


def _rows_of_ranks(batch: Batch) -> list[int]:
    if batch.lane_rows is None:
        return row_counts(len(batch.label), batch.label.device)
    return _sums_of_lanes(batch.lane_rows, world_size())


def _group_sizes(batch: Batch, pair_groups: int, counts: list[int] | None) -> list[int] | None:
    if batch.lane_rows is None or batch.present is not None:
        return None
    sizes = _sums_of_lanes(batch.lane_rows, pair_groups)
    if counts is None:  # this rank's groups only
        owner = [group * world_size() // pair_groups for group in range(pair_groups)]
        sizes = [size * (place == rank()) for size, place in zip(sizes, owner, strict=True)]
    return [0, *sizes]


def _sums_of_lanes(lane_rows: Sequence[int], parts: int) -> list[int]:
    """Rows of every rank or group: lanes are dealt in runs that differ by one lane at most."""
    num_lanes = len(lane_rows)
    edges = [part * num_lanes // parts for part in range(parts + 1)]
    return [sum(lane_rows[start:stop]) for start, stop in pairwise(edges)]


def draw_uniforms(
    group_G: Tensor, width: int, progress: Progress, sizes: Sequence[int] | None = None
) -> Tensor:
    """(G, width) float64 in [0, 1): what the step's pairing is made of.

    Every group has its own CPU generator, so its numbers are the same on every rank and device,
    and depend on nothing outside the group. `sizes` as in `Pool`; None waits for the device.
    """
    if sizes is None:
        sizes = (group_G - UNPAIRED).bincount(minlength=1).tolist()
    parts = [
        torch.rand(size, width, generator=progress.generator("pair", group), dtype=torch.float64)
        for group, size in enumerate(sizes, start=UNPAIRED)
    ]
    uniform = sent(torch.cat(parts), group_G.device)
    return torch.empty_like(uniform).index_copy_(0, group_G.argsort(stable=True), uniform)


def draw_partners(
    pool: Pool, uniform_GJ: Tensor, pairing: Pairing, fused_RC: Tensor
) -> tuple[Tensor, Tensor]:
    """Partners (R, J) of this rank's rows, and which rows (G,) of the pool have any.

    Sorted by group and label, the candidates of a row are one block with at most one gap: its
    group without its own label, or, for `confusion`, the class it is confused with. A row with
    fewer than J candidates repeats them in turn; one without any gets an arbitrary index.

    Args:
        pool: labels and groups.
        uniform_GJ: float64 in [0, 1).
        pairing: see MidasConfig.
        fused_RC: detached logits of the aligned rows; their values are read by `confusion` only.
    """
    if pairing == "permutation":
        partner_GJ = permute_in_groups(uniform_GJ, pool.group_G)
        return partner_GJ[pool.own_R], torch.ones_like(pool.group_G, dtype=torch.bool)
    num_classes = fused_RC.shape[1]
    group_G = pool.group_G * num_classes
    sorted_G, order_G = (group_G + pool.label_G).sort(stable=True)
    first_G, size_G = _block(sorted_G, group_G, num_classes)
    gap_G, gap_size_G = _block(sorted_G, group_G + pool.label_G, 1)
    count_G = size_G - gap_size_G
    first_R, count_R, gap_R, gap_size_R = (
        value[pool.own_R] for value in (first_G, count_G, gap_G, gap_size_G)
    )
    if pairing == "confusion":
        confused_R = confused_class(fused_RC, pool.label_G[pool.own_R])
        start_R, size_R = _block(sorted_G, group_G[pool.own_R] + confused_R, 1)
        found_R = size_R > 0
        first_R = torch.where(found_R, start_R, first_R)
        count_R = torch.where(found_R, size_R, count_R)
        gap_size_R = gap_size_R.where(~found_R, 0)
    position_RJ = first_R[:, None] + distinct_numbers(uniform_GJ[pool.own_R], count_R)
    position_RJ = position_RJ + gap_size_R[:, None] * (position_RJ >= gap_R[:, None])
    return order_G[position_RJ.clamp(max=len(order_G) - 1)], count_G > 0


def draw_slots(uniform_RK: Tensor, num_modalities: int, orders: Orders) -> Tensor:
    """(S, R, M) slot of each modality's source: 0 the row itself, 1..J its partners (A.2).

    Args:
        uniform_RK: in [0, 1), K = `num_orders(orders)` * M.
        num_modalities: M.
        orders: "cyclic" for the M shifts of one random permutation per row, or the number of
            independent random permutations.
    """
    order_RSM = uniform_RK.unflatten(1, (num_orders(orders), num_modalities)).argsort(dim=-1)
    return cyclic_slots(order_RSM[:, 0]) if orders == "cyclic" else order_RSM.transpose(0, 1)


def num_orders(orders: Orders) -> int:
    """Random permutations per row."""
    return 1 if orders == "cyclic" else orders


def make_pairs(pool: Pool, partner_RJ: Tensor, valid_G: Tensor, slot_SRM: Tensor) -> Pairs:
    """Sources and labels of all misaligned samples; a row without partner is its own source."""
    valid_G = valid_G & (pool.group_G != UNPAIRED)
    valid_R = valid_G[pool.own_R]
    partner_RJ = torch.where(valid_R[:, None], partner_RJ, pool.own_R[:, None])
    source_SRM = source_rows(pool.own_R, partner_RJ, slot_SRM)
    num_valid = valid_G.sum()
    if pool.counts is None:
        num_valid = reduce_sums({"valid": num_valid})["valid"].long()
    return Pairs(
        label_SRM=pool.label_G[source_SRM],
        source_SRM=source_SRM,
        slot_SRM=slot_SRM,
        valid_R=valid_R,
        num_valid=num_valid,
        pool=pool,
    )


def distinct_numbers(uniform_RJ: Tensor, count_R: Tensor) -> Tensor:
    """(R, J) numbers in [0, count): a uniform ordered draw without replacement (shift method).

    The j-th is drawn from the count - j that are left, then raised past those taken before it.
    Rows with count < J repeat theirs in turn; rows with count 0 get zeros.
    """
    taken: list[Tensor] = []
    for j, uniform_R in enumerate(uniform_RJ.unbind(dim=1)):
        number_R = (uniform_R * (count_R - j).clamp_min(0)).long()
        if taken:
            for lower_R in torch.stack(taken).sort(dim=0).values:
                number_R = number_R + (number_R >= lower_R)
        taken.append(number_R)
    column_J = torch.arange(len(taken), device=count_R.device)
    return torch.stack(taken, dim=1).gather(1, column_J % count_R.clamp_min(1)[:, None])


def permute_in_groups(key_GJ: Tensor, group_G: Tensor) -> Tensor:
    """(G, J) partners by J permutations inside each pair group (Algorithm 1, line 13).

    Args:
        key_GJ: float64 in [0, 1), random; a row may get itself or a row with its own label.
        group_G: int pair group of every row.
    """
    shuffled_GJ = (key_GJ + group_G[:, None]).argsort(dim=0)
    return torch.empty_like(shuffled_GJ).index_copy_(0, group_G.argsort(stable=True), shuffled_GJ)


def confused_class(logits_RC: Tensor, label_R: Tensor) -> Tensor:
    """(R,) best wrong class among the two highest logits (A.4)."""
    top_R2 = logits_RC.topk(2, dim=1).indices
    return torch.where(top_R2[:, 0] == label_R, top_R2[:, 1], top_R2[:, 0])


def cyclic_slots(order_RM: Tensor) -> Tensor:
    """(M, R, M) slot of each modality's source: the M cyclic shifts of a permutation per row (A.2).

    Slot 0 is the row itself, slots 1..J are its partners. The shifts are listed so that sample s
    keeps modality s: for M=2 these are the two directions A and B of the paper, for any order.
    """
    return (order_RM[None] - order_RM.T[:, :, None]) % order_RM.shape[1]


def source_rows(own_R: Tensor, partner_RJ: Tensor, slot_SRM: Tensor) -> Tensor:
    """(S, R, M) row that supplies each modality, a(m) = K[slot(m)] with K = (own, partners)."""
    rows_RM = torch.cat([own_R[:, None], partner_RJ], dim=1)
    return rows_RM.expand(slot_SRM.shape).gather(2, slot_SRM)


def _block(sorted_G: Tensor, key_N: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Start (N,) and size (N,) of the block of values in [key, key + width)."""
    start_N = torch.searchsorted(sorted_G, key_N)
    return start_N, torch.searchsorted(sorted_G, key_N + width) - start_N
