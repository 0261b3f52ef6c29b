"""MIDAS: training on misaligned samples (NeurIPS 2025, arXiv 2509.25831; methods.md section 2).

A misaligned sample takes its modalities from rows of the batch with different labels. Its soft
label follows the confidence of the unimodal heads, the weak modality's share is weighted up by
alpha while the fusion head neglects it, and samples whose swapped-in feature resembles the replaced
one count more. Pairing is in `pairing.py`, the formulas are in `misalign.py`.

Differences from the paper and the authors' code, on purpose:

- Pairing is over the whole global batch by default (`pair_groups=1`), also across ranks; each pair
  group has a draw of its own, seeded by (seed, epoch, step, group). The result does not depend on
  the number of workers. The price, with more than one, is an exchange of labels and features in
  every step; `pair_groups` equal to a multiple of the number of workers avoids it.
- alpha is a buffer: it is checkpointed, equal on all ranks, and driven by sums over all ranks. The
  authors keep a Python float per process that restarts at 1.
- alpha moves by `eta * sign(...)` as their code does; a tie leaves it where it is.
- Partners always carry another label (text of the paper; the published Algorithm 1 and the code
  shuffle). Rows without such a partner are left out of the loss and of the alpha statistics.
- M > 2: the M cyclic shifts of one random permutation per row, partners distinct where possible.
- Rows that lack a modality take no part in pairs and in the alpha statistics.
- `similarity="l2"` and `pairing="confusion"` are named but not defined in the paper; see methods.md
  2.9 for the reading taken here.

Shapes: R rows of this rank, G of the pool they are paired in, M modalities, S misaligned samples
per row.
"""

import logging

import torch
from torch import Tensor

from training.batch import Batch, Progress, StepOutput
from training.config import AlphaFlip, AlphaStat, MidasConfig, Pairing, UniReduction
from training.distributed import rank, reduce_sums
from training.methods.base import (
    Method,
    cross_entropy_sum,
    global_mean,
    step_output,
    unimodal_losses,
)
from training.methods.misalign import (
    carried_alpha,
    confidence,
    hard_weight,
    label_log_probability,
    mean_over_replaced,
    misaligned_loss,
    next_alpha,
    ratio_step,
    share,
    share_step,
    similarity,
    statistics,
)
from training.methods.pairing import (
    Pairs,
    Pool,
    draw_partners,
    draw_slots,
    draw_uniforms,
    make_pairs,
    make_pool,
    num_orders,
)
from training.model import MultimodalModel

ALPHA_ALARM = 10.0

logger = logging.getLogger(__name__)


class ResolvedMidas(MidasConfig, frozen=True):
    """MidasConfig with the choices of the variant filled in; defaults as in the paper."""

    pairing: Pairing = "mismatch"
    uni_reduction: UniReduction = "sum"
    alpha_stat: AlphaStat = "mean_of_ratios"
    alpha_flip: AlphaFlip = "reset"


OFFICIAL_CODE: dict[str, str] = {
    "pairing": "permutation",
    "uni_reduction": "mean",
    "alpha_stat": "ratio_of_means",
    "alpha_flip": "carry",
}


def resolve(config: MidasConfig) -> ResolvedMidas:
    """Fill the fields left at None from the variant; fields that were set win."""
    chosen = {name: value for name, value in config if value is not None}
    variant = OFFICIAL_CODE if config.variant == "official_code" else {}
    return ResolvedMidas.model_validate({**variant, **chosen})


class Midas(Method):
    """Joint training + unimodal losses + misaligned samples, after a warm-up of the encoders.

    Attributes:
        alpha: (M,) float64 buffer, weight of each modality's share in the misaligned loss.
        weak: () int64 buffer, the weak modality of the last step, -1 before the first.
    """

    alpha: Tensor
    weak: Tensor

    def __init__(self, model: MultimodalModel, config: MidasConfig):
        super().__init__(model, config.warmup_epochs)
        self.config = resolve(config)
        num_modalities = len(model.modalities)
        if self.config.alpha_stat == "ratio_of_means" and num_modalities != 2:
            raise ValueError(
                f"alpha_stat='ratio_of_means' is defined for 2 modalities, the data has "
                f"{num_modalities}; use alpha_stat='mean_of_ratios' (variant='paper')"
            )
        self.register_buffer("alpha", torch.ones(num_modalities, dtype=torch.float64))
        self.register_buffer("weak", torch.tensor(-1))
        self._warned = False

    def set_phase(self, epoch: int) -> None:
        """The fusion head gets no gradient during warm-up."""
        self.model.fusion.requires_grad_(self.is_main_phase(epoch))

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        """Warm-up: L_uni. Main phase: L_align + L_uni + lambda * L_mis (2.2 item 7)."""
        is_main = self.is_main_phase(progress.epoch)
        drawn = self._draw(batch, progress) if is_main else None
        features = self.model.encode(batch.inputs, batch.present)
        logits = self.model.unimodal_logits(features)
        uni = torch.stack(unimodal_losses(logits, batch))
        uni = uni.sum() if self.config.uni_reduction == "sum" else uni.mean()
        if drawn is None:
            return step_output(global_mean(uni, batch.global_rows), batch, loss_uni=uni)
        fused = self.model.fuse(features)
        align = cross_entropy_sum(fused, batch.label)
        pairs = self._pair(*drawn, fused.detach())
        mis, stats = self._misaligned(batch, features, logits, pairs)
        num_misaligned = (pairs.num_valid * pairs.slot_SRM.shape[0]).clamp_min(1)
        loss = global_mean(align + uni, batch.global_rows)
        loss = loss + self.config.lambda_mis * global_mean(mis, num_misaligned)
        return step_output(loss, batch, loss_align=align, loss_uni=uni, loss_mis=mis, **stats)

    def _draw(self, batch: Batch, progress: Progress) -> tuple[Pool, Tensor]:
        """The rows to pair, and (G, J + orders * M) random numbers to do so."""
        num_modalities, orders = len(self.model.modalities), self.config.perms_per_sample
        pool = make_pool(batch, self.config.pair_groups)
        width = num_modalities - 1 + num_orders(orders) * num_modalities
        return pool, draw_uniforms(pool.group_G, width, progress, pool.sizes)

    def _pair(self, pool: Pool, uniform_GK: Tensor, fused_RC: Tensor) -> Pairs:
        """Sources of this rank's misaligned samples."""
        config, num_modalities = self.config, len(self.model.modalities)
        num_partners = num_modalities - 1
        partner_RJ, valid_G = draw_partners(
            pool, uniform_GK[:, :num_partners], config.pairing, fused_RC
        )
        slot_SRM = draw_slots(
            uniform_GK[pool.own_R, num_partners:], num_modalities, config.perms_per_sample
        )
        return make_pairs(pool, partner_RJ, valid_G, slot_SRM)

    def _misaligned(
        self, batch: Batch, features: dict[str, Tensor], logits: dict[str, Tensor], pairs: Pairs
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """L_mis summed over this rank's misaligned samples, (), and the sums it leaves behind."""
        kind, shape = self.config.similarity, pairs.slot_SRM.shape
        confidence_RM = torch.stack([confidence(z, batch.label) for z in logits.values()], dim=1)
        modality_M = torch.arange(shape[2], device=confidence_RM.device)
        confidence_GM, swapped = self._swapped(batch, features, confidence_RM, pairs)
        share_SRM = share(confidence_GM[pairs.source_SRM, modality_M])
        fused_SRC = self.model.fuse(swapped).unflatten(0, shape[:2])
        log_probability_SRM = label_log_probability(fused_SRC, pairs.label_SRM)
        likeness = [
            similarity(features[name], swapped[name].unflatten(0, shape[:2]), kind)
            for name in features
        ]
        similarity_SR = mean_over_replaced(torch.stack(likeness, dim=-1), pairs.slot_SRM)
        hard_SR = hard_weight(similarity_SR, kind)
        if not self.config.hard_sample_weighting:
            hard_SR = torch.ones_like(hard_SR)

        stats = statistics(
            confidence_RM,
            share_SRM,
            log_probability_SRM,
            similarity_SR,
            pairs.valid_R,
            batch.complete,
        )
        alpha_M = self.alpha
        if self.config.alpha_flip == "carry":
            alpha_M = carried_alpha(alpha_M, self._weak(reduce_sums(stats)))
        loss_SR = misaligned_loss(alpha_M, share_SRM, log_probability_SRM, hard_SR)
        return (loss_SR * pairs.valid_R).sum(), stats

    def _swapped(
        self, batch: Batch, features: dict[str, Tensor], confidence_RM: Tensor, pairs: Pairs
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the sources supply, from as few exchanges between ranks as possible.

        Returns:
            (G, M) confidences, detached, and modality -> (S*R, D_m) features of the misaligned
            samples, attached to all sources.
        """
        pool, index_MN = pairs.pool, pairs.source_SRM.movedim(-1, 0).flatten(1)
        if self.config.mix_level == "input":
            inputs = {
                name: pool.gather(batch.inputs[name])[0][index_N]
                for name, index_N in zip(features, index_MN, strict=True)
            }
            return pool.gather(confidence_RM)[0], self.model.encode(inputs)
        confidence_GM, *pooled = pool.gather(confidence_RM, *features.values())
        swapped = {
            name: rows[index_N]
            for name, rows, index_N in zip(features, pooled, index_MN, strict=True)
        }
        return confidence_GM.detach(), swapped

    def _weak(self, sums: dict[str, Tensor]) -> Tensor:
        """() least confident modality: on misaligned samples (2.2 item 4) or on aligned rows."""
        by_share = self.config.alpha_stat == "mean_of_ratios"
        return sums["conf_uni" if by_share else "raw_uni"].argmin()

    def after_step(self, sums: dict[str, Tensor], progress: Progress) -> None:
        """Move alpha by the reduced statistics of this step; adds alpha and flips to `sums`."""
        if not self.is_main_phase(progress.epoch):
            return
        weak, found = self._weak(sums), sums["n_valid"] > 0
        flipped = found & (self.weak >= 0) & (weak != self.weak)
        self.weak.copy_(torch.where(found, weak, self.weak))
        if self.config.weak_modality_weighting:
            self.alpha.copy_(torch.where(found, self._moved_alpha(sums, weak), self.alpha))
        steps = torch.ones_like(sums["n_valid"])
        sums.update(alpha=self.alpha.clone(), alpha_flips=flipped.double(), steps=steps)

    def _moved_alpha(self, sums: dict[str, Tensor], weak: Tensor) -> Tensor:
        config = self.config
        if config.alpha_stat == "mean_of_ratios":
            step = share_step(sums["conf_uni"], sums["conf_multi"])
        else:
            step = ratio_step(sums["raw_uni"], sums["raw_multi"], config.kinetics_ratio_test)
        return next_alpha(self.alpha, weak, step, config.eta, config.alpha_flip, config.alpha_cap)

    def predict(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fusion head and unimodal heads, (B, C) each."""
        return {"fused": self.model.fuse(features), **self.model.unimodal_logits(features)}

    def epoch_metrics(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Losses, confidences (Fig. 3), alpha (Fig. 4) and mean similarities of an epoch.

        `hard/s_mean_kept/m` is over the misaligned samples that keep modality m; random orders
        (`perms_per_sample` not "cyclic") have the overall mean only.
        """
        rows = sums["rows"]
        metrics = {"train/loss_uni": sums["loss_uni"] / rows}
        if "n_valid" in sums:
            self._warn_of_large_alpha()
            num_valid = sums["n_valid"].clamp_min(1)
            num_misaligned = num_valid * len(sums["s_sum"])
            metrics |= {
                "train/loss_align": sums["loss_align"] / rows,
                "train/loss_mis": sums["loss_mis"] / num_misaligned,
                "hard/s_mean": sums["s_sum"].sum() / num_misaligned,
                "alpha_flips": sums["alpha_flips"],
            }
            for m, name in enumerate(self.model.modalities):
                metrics |= {
                    f"alpha/{name}": self.alpha[m],
                    f"alpha_mean/{name}": sums["alpha"][m] / sums["steps"],
                    f"conf_uni/{name}": sums["conf_uni"][m] / num_misaligned,
                    f"conf_multi/{name}": sums["conf_multi"][m] / num_misaligned,
                }
                if self.config.perms_per_sample == "cyclic":
                    metrics[f"hard/s_mean_kept/{name}"] = sums["s_sum"][m] / num_valid
        return {name: float(value) for name, value in metrics.items()}

    def _warn_of_large_alpha(self) -> None:
        """Once, on rank 0: the paper sets no bound on alpha (methods.md 2.8 #10)."""
        if self._warned or rank() != 0 or not bool(self.alpha.max() > ALPHA_ALARM):
            return
        self._warned = True
        m = int(self.alpha.argmax())
        logger.warning(
            "alpha of modality %s is %.2f, above %g; the misaligned loss may drown the other "
            "terms; set midas.alpha_cap or lower midas.eta",
            self.model.modalities[m],
            float(self.alpha[m]),
            ALPHA_ALARM,
        )
