"""MIDAS formulas as pure functions: soft labels, weights, loss, alpha (methods.md 2.2-2.5).

Shapes: R rows of this rank, M modalities, S misaligned samples built per row, C classes, D features
of one modality. Items are those of methods.md 2.2, which follow equations 1-11 of the paper.
"""

import torch
from torch import Tensor
from torch.nn import functional

from training.config import AlphaFlip, Similarity
from training.methods.base import wide


def confidence(logits_RC: Tensor, label_R: Tensor) -> Tensor:
    """(R,) probability of the row's own label, detached: c of item 2."""
    probability = wide(logits_RC.detach()).softmax(dim=1)
    return probability.gather(1, label_R[:, None]).squeeze(1)


def share(value_SRM: Tensor) -> Tensor:
    """(S, R, M) values divided by their sum over modalities: c~ of item 2 and c^ of item 3."""
    return value_SRM / value_SRM.sum(dim=-1, keepdim=True).clamp_min(1e-12)


def label_log_probability(logits_SRC: Tensor, label_SRM: Tensor) -> Tensor:
    """(S, R, M) log p~ at the label of each modality's source (item 3)."""
    return wide(logits_SRC).log_softmax(dim=-1).gather(2, label_SRM)


def similarity(own_RD: Tensor, swapped_SRD: Tensor, kind: Similarity) -> Tensor:
    """(S, R) likeness of swapped-in and replaced feature, detached: cosine or 1/(1+distance)."""
    own, swapped = wide(own_RD.detach()), wide(swapped_SRD.detach())
    if kind == "cosine":
        return functional.cosine_similarity(own[None], swapped, dim=-1, eps=1e-8)
    return 1 / (1 + (own - swapped).norm(dim=-1))


def mean_over_replaced(value_SRM: Tensor, slot_SRM: Tensor) -> Tensor:
    """(S, R) mean over the modalities that do not come from the row itself (A.2)."""
    replaced = slot_SRM != 0
    return (value_SRM * replaced).sum(dim=-1) / replaced.sum(dim=-1)


def hard_weight(similarity_SR: Tensor, kind: Similarity) -> Tensor:
    """(S, R) weight h in [1, 2] (item 6): 1 + (s~+1)/2, or 1 + 1/(1+distance) for l2."""
    return 1 + (similarity_SR + 1) / 2 if kind == "cosine" else 1 + similarity_SR


def misaligned_loss(
    alpha_M: Tensor, share_SRM: Tensor, log_probability_SRM: Tensor, hard_SR: Tensor
) -> Tensor:
    """(S, R) L_mis = h * -sum_m alpha_m c~_m log p~_m (item 7); weights are not renormalised."""
    weight_SRM = alpha_M.to(log_probability_SRM.dtype) * share_SRM
    return hard_SR * -(weight_SRM * log_probability_SRM).sum(dim=-1)


def share_step(conf_uni_M: Tensor, conf_multi_M: Tensor) -> Tensor:
    """Direction of the alpha update: sign(E[c~] - E[c^]) of the weak modality (items 4, 5)."""
    weak = conf_uni_M.argmin()
    return torch.sign(conf_uni_M.take(weak) - conf_multi_M.take(weak))


def ratio_step(raw_uni_M: Tensor, raw_multi_SM: Tensor, kinetics: bool) -> Tensor:
    """The authors' direction, in {-1, 1}: ratios of raw mean confidences, M = 2 (methods.md 3.1).

    Args:
        raw_uni_M: mean (or sum) of c over aligned rows.
        raw_multi_SM: mean (or sum) of p~ at the labels, per direction.
        kinetics: when the first modality is weak, compare the inverted ratio with the ratio that is
            not inverted, as their Kinetics-Sounds branch does (row 12).
    """
    uni = raw_uni_M[0] / raw_uni_M[1]
    multi = (raw_multi_SM[:, 0] / raw_multi_SM[:, 1]).mean()
    inverted = (raw_multi_SM[:, 1] / raw_multi_SM[:, 0]).mean()
    first_up = inverted > uni if kinetics else multi < uni
    up = torch.where(uni > 1, multi > uni, first_up)
    return up.to(uni.dtype) * 2 - 1


def next_alpha(
    alpha_M: Tensor,
    weak: Tensor,
    step: Tensor,
    eta: float,
    flip: AlphaFlip,
    cap: float | None,
) -> Tensor:
    """(M,) weights after the update alpha_weak <- max(1, alpha_weak + eta * step) (item 5).

    `flip` says what the others hold: `reset` 1, `keep` their value; `carry` is the authors' single
    number, the largest entry, which moves to whichever modality is weak now.
    """
    start = alpha_M.max() if flip == "carry" else alpha_M.take(weak)
    moved = (start + eta * step).clamp(min=1.0, max=cap)
    others_M = alpha_M if flip == "keep" else torch.ones_like(alpha_M)
    return torch.where(_one_hot(weak, alpha_M), moved, others_M)


def carried_alpha(alpha_M: Tensor, weak: Tensor) -> Tensor:
    """(M,) weights of this step under `carry`: the single number at the modality weak now."""
    return torch.where(_one_hot(weak, alpha_M), alpha_M.max(), torch.ones_like(alpha_M))


def statistics(
    confidence_RM: Tensor,
    share_SRM: Tensor,
    log_probability_SRM: Tensor,
    similarity_SR: Tensor,
    valid_R: Tensor,
    complete_R: Tensor,
) -> dict[str, Tensor]:
    """This rank's sums behind alpha and the diagnostics, in float64: over valid rows, `raw_uni`
    over the rows that have all modalities."""
    probability_SRM = log_probability_SRM.detach().exp().double()
    valid_R1 = valid_R[:, None].double()
    return {
        "n_valid": valid_R.double().sum(),
        "raw_uni": (confidence_RM.double() * complete_R[:, None]).sum(dim=0),
        "raw_multi": (probability_SRM * valid_R1).sum(dim=1),
        "conf_uni": (share_SRM.double() * valid_R1).sum(dim=(0, 1)),
        "conf_multi": (share(probability_SRM) * valid_R1).sum(dim=(0, 1)),
        "s_sum": (similarity_SR.double() * valid_R).sum(dim=1),
    }


def _one_hot(index: Tensor, like_M: Tensor) -> Tensor:
    return torch.arange(like_M.shape[0], device=like_M.device) == index
