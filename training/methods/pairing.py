"""Who is paired with whom in MIDAS: drawn for the whole global batch, alike on every rank.

Shapes: R rows of this rank, G rows of the whole global batch, M modalities, J = M - 1 partners of a
row, S misaligned samples built per row, C classes.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from training.batch import Batch
from training.distributed import gather_rows, rank, row_counts, world_size

Pairing = Literal["mismatch", "permutation", "confusion"]
Orders = Literal["cyclic"] | int


@dataclass(frozen=True)
class GlobalRows:
    """What every rank knows about the rows of the global batch.

    Attributes:
        label_G: class ids.
        group_G: pair group; partners belong to one group.
        own_R: where this rank's rows are.
        counts: rows of every rank.
        groups_are_local: no group has rows of two ranks.
    """

    label_G: Tensor
    group_G: Tensor
    own_R: Tensor
    counts: list[int]
    groups_are_local: bool


@dataclass(frozen=True)
class Pairs:
    """Who supplies what to the misaligned samples of this rank's rows.

    Attributes:
        label_SRM: label of the row that supplies each modality.
        source_SRM: that row, as an index into what `pool` returns.
        slot_SRM: 0 where the row itself supplies the modality.
        valid_R: rows that found a partner.
        num_valid: (), such rows in the global batch.
        counts: rows of every rank, or None if no pair leaves its rank.
    """

    label_SRM: Tensor
    source_SRM: Tensor
    slot_SRM: Tensor
    valid_R: Tensor
    num_valid: Tensor
    counts: list[int] | None

    def pool(self, rows: Tensor) -> Tensor:
        """All rows that can be a source: this rank's, or those of all ranks; differentiable."""
        return rows if self.counts is None else gather_rows(rows, self.counts)


def global_rows(batch: Batch, pair_groups: int) -> GlobalRows:
    """Gather labels and pair groups; lanes are dealt to groups like they are to ranks."""
    counts = row_counts(len(batch.label), batch.label.device)
    first = sum(counts[: rank()])
    group = batch.lane * pair_groups // batch.num_lanes
    table = gather_rows(torch.stack([batch.label, group], dim=1), counts)
    return GlobalRows(
        label_G=table[:, 0],
        group_G=table[:, 1],
        own_R=torch.arange(first, first + len(batch.label), device=table.device),
        counts=counts,
        groups_are_local=pair_groups % world_size() == 0 and batch.num_lanes % world_size() == 0,
    )


def draw_partners(
    rows: GlobalRows,
    num_partners: int,
    pairing: Pairing,
    fused_RC: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Partners (R, J) of this rank's rows, and which rows (G,) of the batch have any.

    The draw is made for the global batch, on the CPU: it is the same on every rank and device, and
    takes G * G random numbers (6 ms for 512 rows on one core).

    Args:
        rows: labels and groups.
        num_partners: J.
        pairing: see MidasConfig.
        fused_RC: detached logits of the aligned rows, read by `confusion` only.
        generator: in the same state on every rank.
    """
    count, device = len(rows.label_G), rows.label_G.device
    if pairing == "permutation":
        key = torch.rand(count, num_partners, generator=generator, dtype=torch.float64)
        partner_GJ = permute_in_groups(key.to(device), rows.group_G)
        return partner_GJ[rows.own_R], torch.ones_like(rows.label_G, dtype=torch.bool)
    candidate_GG = is_candidate(rows.label_G, rows.group_G)
    score_RG = torch.rand(count, count, generator=generator).to(device)[rows.own_R]
    if pairing == "confusion":
        preferred = confused_class(fused_RC, rows.label_G[rows.own_R])
        score_RG = score_RG + (preferred[:, None] == rows.label_G)
    partner_RJ = pick_partners(score_RG, candidate_GG[rows.own_R], num_partners)
    return partner_RJ, candidate_GG.any(dim=1)


def draw_slots(
    rows: GlobalRows, num_modalities: int, orders: Orders, generator: torch.Generator
) -> Tensor:
    """(S, R, M) slot of each modality's source: 0 the row itself, 1..J its partners (A.2).

    Args:
        rows: labels and groups.
        num_modalities: M.
        orders: "cyclic" for the M shifts of one random permutation per row, or the number of
            independent random permutations.
        generator: in the same state on every rank.
    """
    num_orders = 1 if orders == "cyclic" else orders
    key = torch.rand(len(rows.label_G), num_orders, num_modalities, generator=generator)
    order_RSM = key.argsort(dim=-1).to(rows.own_R.device)[rows.own_R]
    return cyclic_slots(order_RSM[:, 0]) if orders == "cyclic" else order_RSM.transpose(0, 1)


def make_pairs(rows: GlobalRows, partner_RJ: Tensor, valid_G: Tensor, slot_SRM: Tensor) -> Pairs:
    """Sources and labels of all misaligned samples; a row without partner is its own source."""
    valid_R = valid_G[rows.own_R]
    partner_RJ = torch.where(valid_R[:, None], partner_RJ, rows.own_R[:, None])
    source_SRM = source_rows(rows.own_R, partner_RJ, slot_SRM)
    first = sum(rows.counts[: rank()])
    return Pairs(
        label_SRM=rows.label_G[source_SRM],
        source_SRM=source_SRM - first if rows.groups_are_local else source_SRM,
        slot_SRM=slot_SRM,
        valid_R=valid_R,
        num_valid=valid_G.sum(),
        counts=None if rows.groups_are_local else rows.counts,
    )


def is_candidate(label_G: Tensor, group_G: Tensor) -> Tensor:
    """(G, G) bool: the column's row may be a partner of the row's; same group, another label."""
    return (label_G[:, None] != label_G) & (group_G[:, None] == group_G)


def pick_partners(score_RG: Tensor, candidate_RG: Tensor, num_partners: int) -> Tensor:
    """(R, J) partners of every row: its candidates with the highest scores, best first.

    Uniform scores make a uniform draw without repetition. Rows with fewer than J candidates repeat
    theirs in turn; rows without any get an arbitrary index.
    """
    ranked = score_RG.masked_fill(~candidate_RG, -1.0)
    best = ranked.topk(min(num_partners, ranked.shape[1]), dim=1).indices
    available_R1 = candidate_RG.sum(dim=1, keepdim=True).clamp(1, best.shape[1])
    column_J = torch.arange(num_partners, device=best.device)
    return best.gather(1, column_J % available_R1)


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
