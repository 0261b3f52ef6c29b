"""Unimodal training: every modality alone, the reference for what each can reach by itself."""

import torch
from torch import Tensor

from training.batch import Batch, Progress, StepOutput
from training.methods.base import Method, global_mean, step_output, unimodal_losses, wide
from training.model import MultimodalModel


class Unimodal(Method):
    """L = sum_m CE(p^m, y): no parameter is shared, so each encoder trains as if it were alone.

    The fusion head is frozen; the fused prediction is the mean of the unimodal probabilities, for a
    modality that a row lacks those that its head gives to zero features.
    """

    def __init__(self, model: MultimodalModel):
        super().__init__(model)
        model.fusion.requires_grad_(False)

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        """Cross-entropies of the unimodal heads."""
        logits = self.model.unimodal_logits(self.model.encode(batch.inputs, batch.present))
        losses = torch.stack(unimodal_losses(logits, batch))
        loss = global_mean(losses.sum(), batch.global_rows)
        return step_output(loss, batch)

    def predict(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Unimodal heads and the logarithm of their mean probability, (B, C) each."""
        logits = self.model.unimodal_logits(features)
        log_probabilities = torch.stack([wide(z).log_softmax(dim=1) for z in logits.values()])
        return {"fused": log_probabilities.logsumexp(dim=0), **logits}
