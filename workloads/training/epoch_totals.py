"""Loss and accuracy of an epoch, added up on the device without waiting for it."""

from __future__ import annotations

import math

import torch

from workloads.common.errors import DivergedError


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

    def require_finite(self, when: str, lr: float, precision: str) -> None:
        """Look at what has been added since the last ``take``; waits for the device.

        Raises:
            DivergedError: The sum of the losses is NaN or infinite.
        """
        require_finite_loss(self.loss_sum.item(), when, lr, precision)


def require_finite_loss(loss: float, when: str, lr: float, precision: str) -> None:
    """Refuse a loss that is none: one such batch makes the sum of its epoch NaN or infinite.

    Args:
        loss: Of an epoch or a part of one, which loss and of when is said by ``when``.
        when: For the sentence, such as ``the training loss in epoch 2``.
        lr: Highest learning rate, for the sentence.
        precision: Arithmetic of the training, for the sentence.

    Raises:
        DivergedError: It is NaN or infinite.
    """
    if not math.isfinite(loss):
        raise DivergedError(
            f"the training diverged: {when} became {loss} (learning rate {lr:g}, {precision}), so "
            f"no figure of it counts; try --lr {lr / 10:g}"
            + ("" if precision == "fp32" else " or --precision fp32")
        )
