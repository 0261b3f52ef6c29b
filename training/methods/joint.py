"""Joint training: the fusion head's cross-entropy, alone or with unimodal ones (methods.md 4.1)."""

from torch import Tensor

from training.batch import Batch, Progress, StepOutput
from training.methods.base import (
    Method,
    cross_entropy_sum,
    global_mean,
    step_output,
    unimodal_losses,
)
from training.model import MultimodalModel


class Joint(Method):
    """L = CE(p, y). The unimodal heads are frozen; modalities are judged by slice logits."""

    def __init__(self, model: MultimodalModel):
        super().__init__(model)
        model.heads.requires_grad_(False)

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        """Cross-entropy of the fusion head."""
        fused = self.model.fuse(self.model.encode(batch.inputs, batch.present))
        loss = global_mean(cross_entropy_sum(fused, batch.label), batch.global_rows)
        return step_output(loss, batch)

    def predict(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fusion head and each modality's share of it, (B, C) each."""
        return {"fused": self.model.fuse(features), **self.model.slice_logits(features)}


class JointUni(Method):
    """L = CE(p, y) + sum_m CE(p^m, y), the "multi-loss" baseline."""

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        """Cross-entropies of the fusion head and of all unimodal heads."""
        features = self.model.encode(batch.inputs, batch.present)
        align = cross_entropy_sum(self.model.fuse(features), batch.label)
        logits = self.model.unimodal_logits(features)
        uni = sum(unimodal_losses(logits, batch), start=align.new_zeros(()))
        loss = global_mean(align + uni, batch.global_rows)
        return step_output(loss, batch, loss_align=align, loss_uni=uni)

    def predict(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fusion head and unimodal heads, (B, C) each."""
        return {"fused": self.model.fuse(features), **self.model.unimodal_logits(features)}

    def epoch_metrics(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Mean of each loss term over all rows."""
        return {
            f"train/{name}": float(sums[name] / sums["rows"]) for name in ("loss_align", "loss_uni")
        }
