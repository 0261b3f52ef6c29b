"""OGM-GE: on-the-fly gradient modulation (CVPR 2022; methods.md 4.2).

The modality that leads on the batch gets smaller encoder gradients; noise of the gradient's own
scale (GE) keeps them from generalising worse.
"""

import torch
from torch import Tensor, nn

from training.batch import Batch, Progress, StepOutput
from training.config import OgmGeConfig
from training.methods.base import Method, cross_entropy_sum, global_mean, step_output, wide
from training.model import MultimodalModel


def coefficients(score_M: Tensor, strength: float) -> Tensor:
    """(M,) factors k_m: 1 - tanh(a * rho) for rho > 1, else 1; rho_m = s_m / min_l s_l."""
    ratio_M = score_M / score_M.min().clamp_min(1e-5)
    return torch.where(ratio_M > 1, 1 - torch.tanh(strength * ratio_M), torch.ones_like(ratio_M))


def modulated(encoder: nn.Module) -> list[nn.Parameter]:
    """Parameters whose gradients are modulated: convolutions, as in the paper.

    An encoder without any (MLP, transformer) has its matrices modulated instead; biases and norms
    never are.
    """
    learning = [p for p in encoder.parameters() if p.grad is not None]
    convolutions = [p for p in learning if p.ndim == 4]
    return convolutions or [p for p in learning if p.ndim >= 2]


class OgmGe(Method):
    """Joint training with modulated encoder gradients.

    Differences: scores are summed over all ranks before the ratio, and noise comes from a generator
    that is alike on all ranks (a rank-local version lets replicas drift apart). More than two
    modalities: each is compared with the lowest score, as BalanceBenchmark does; for two this is
    the paper's rule. The unimodal heads are frozen; scores are read from slice logits.
    """

    def __init__(self, model: MultimodalModel, config: OgmGeConfig):
        super().__init__(model)
        self.config = config
        model.heads.requires_grad_(False)

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        """Cross-entropy of the fusion head, and each modality's score s_m summed over the rows that
        have all modalities."""
        features = self.model.encode(batch.inputs, batch.present)
        align = cross_entropy_sum(self.model.fuse(features), batch.label)
        with torch.no_grad():
            slices = self.model.slice_logits(features).values()
            probabilities = [wide(z).softmax(dim=1) for z in slices]
            scores = [p.gather(1, batch.label[:, None]).squeeze(1) for p in probabilities]
            complete_B = batch.complete
            score_M = torch.stack([(score_B * complete_B).sum() for score_B in scores])
        loss = global_mean(align, batch.global_rows)
        return step_output(loss, batch, scores=score_M, complete=complete_B.sum())

    def after_backward(self, sums: dict[str, Tensor], progress: Progress) -> None:
        """g <- k_m g + xi, xi ~ N(0, std(g) + 1e-8), for every modulated gradient g."""
        if not self.config.start_epoch <= progress.epoch <= self.config.end_epoch:
            return
        factor_M = coefficients(sums["scores"], self.config.strength)
        for m, name in enumerate(self.model.modalities):
            parameters = modulated(self.model.encoders[name])
            gradients = [p.grad for p in parameters if p.grad is not None]
            self._modulate(gradients, factor_M[m], m, progress)

    def _modulate(
        self, gradients: list[Tensor], factor: Tensor, modality: int, progress: Progress
    ) -> None:
        """Scale gradients in place and add noise; the draw is the same on every rank."""
        generator = progress.generator("ogm", modality, device=factor.device)
        for grad in gradients:
            spread = grad.std() + 1e-8
            grad.mul_(factor)
            if self.config.noise:
                noise = torch.randn(
                    grad.shape, generator=generator, device=grad.device, dtype=grad.dtype
                )
                grad.add_(noise * spread)

    def predict(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fusion head and each modality's share of it, (B, C) each."""
        return {"fused": self.model.fuse(features), **self.model.slice_logits(features)}

    def epoch_metrics(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Mean score of each modality: the probability its slice gives to the label."""
        return {
            f"ogm/score/{name}": float(sums["scores"][m] / sums["complete"].clamp_min(1))
            for m, name in enumerate(self.model.modalities)
        }
