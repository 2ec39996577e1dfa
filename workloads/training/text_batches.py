"""Batches of token sequences that lie on the device, ready to be captured.

A cursor on the device moves along the order of all epochs, so that taking a batch is device work
only and can be part of a CUDA graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import BertTokenizerFast

    from workloads.common.device import ComputeDevice
    from workloads.training.text_data import TextSplit


class TokenBatches:
    """A split, tokenized to one fixed length, with the order of its epochs.

    Attributes:
        samples: How many texts there are.
        batch_size: How many a full batch has; no more than there are texts.
        cursor: int64 scalar on the device: where in the order of all epochs the next batch begins.
    """

    def __init__(
        self,
        device: ComputeDevice,
        split: TextSplit,
        tokenizer: BertTokenizerFast,
        max_length: int,
        batch_size: int,
        orders: Sequence[torch.Tensor],
    ) -> None:
        """Tokenize ``split`` and copy it to the device.

        Args:
            device: Where the batches are wanted.
            split: Texts and labels; at least one.
            tokenizer: Pads and cuts to ``max_length`` tokens.
            max_length: Tokens a sequence, padding included.
            batch_size: Sequences a batch.
            orders: One permutation of the samples an epoch.
        """
        where = device.torch_device
        self.samples = len(split)
        self.batch_size = min(batch_size, self.samples)
        encoded = tokenizer(
            list(split.texts), padding="max_length", truncation=True, max_length=max_length,
            return_tensors="pt",
        )  # fmt: skip
        # int32 halves the memory of a large corpus; an embedding accepts it as it is.
        self._tokens = encoded["input_ids"].to(where, torch.int32)
        self._lengths = encoded["attention_mask"].sum(dim=1).to(where)
        self._labels = torch.tensor(split.labels, dtype=torch.int64, device=where)
        self._order = torch.cat(list(orders)).to(where)
        self.cursor = torch.zeros((), dtype=torch.int64, device=where)
        self._offsets = torch.arange(self.batch_size, device=where)
        self._positions = torch.arange(max_length, device=where)
        # What SDPA adds to the scores: in the dtype of the scores, or each layer would convert it.
        # The most negative number instead of -inf, as transformers does.
        self._keep = torch.zeros((), dtype=device.model_dtype, device=where)
        self._drop = torch.full_like(self._keep, torch.finfo(device.model_dtype).min)

    @property
    def full_batches(self) -> int:
        """How many full batches an epoch has."""
        return self.samples // self.batch_size

    @property
    def remainder(self) -> int:
        """How many samples an epoch's last, smaller batch has; 0 where there is none."""
        return self.samples % self.batch_size

    def start_epoch(self, epoch: int) -> None:
        """Go to the first batch of ``epoch`` (from 0)."""
        self.cursor.fill_(epoch * self.samples)

    def take(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the next ``count`` samples and move on; device work only.

        Returns:
            Token numbers, int32 of shape (count, length); the attention mask to add to the scores,
            shape (count, 1, 1, length); labels, int64 of shape (count,). The mask has four
            dimensions because transformers passes such a mask on as it is, while it asks a mask of
            two dimensions whether it is all ones, which waits for the device.
        """
        # Warm-up steps may run past the end of a small dataset: start again there.
        positions = (self.cursor + self._offsets[:count]) % len(self._order)
        picked = self._order[positions]
        self.cursor.add_(count)
        is_token = self._positions < self._lengths[picked, None]
        mask = torch.where(is_token, self._keep, self._drop)[:, None, None, :]
        return self._tokens[picked], mask, self._labels[picked]


def epoch_orders(samples: int, epochs: int, seed: int) -> list[torch.Tensor]:
    """Return one random permutation an epoch, the same on every device for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(samples, generator=generator) for _ in range(epochs)]
