"""Loss and accuracy of an epoch, added up on the device without waiting for it."""

from __future__ import annotations

import torch


class EpochTotals:
    """Sums over the samples of an epoch; adding is device work that a CUDA graph can hold."""

    def __init__(self, device: torch.device) -> None:
        """Start at zero on ``device``."""
        self.loss_sum = torch.zeros((), device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What a repeated job has to start from again."""
        return self.loss_sum, self.correct

    def add(self, logits: torch.Tensor, labels: torch.Tensor, loss: torch.Tensor) -> None:
        """Add one batch.

        Args:
            logits: Shape (batch, classes), detached.
            labels: int64, shape (batch,).
            loss: Mean loss of the batch, detached.
        """
        self.loss_sum.add_(loss.float() * len(labels))
        self.correct.add_((logits.argmax(dim=1) == labels).sum())

    def take(self, samples: int) -> tuple[float, float]:
        """Return mean loss and accuracy in percent over ``samples``, and start again at zero."""
        # One copy, so one wait for the device.
        loss, correct = torch.stack((self.loss_sum.double(), self.correct.double())).tolist()
        self.loss_sum.zero_()
        self.correct.zero_()
        return loss / samples, 100 * correct / samples
