"""Copies of the text, one for each block of tokens, in a single process, written apart from the engine."""

from typing import Any

import torch
from torch import Tensor

from tests.oracle import DenseClearProcessor, softmax_attention
from tests.pooled_oracle import Pooled


def counts_of(height: int, width: int, side: int) -> tuple[int, int]:
    """Copies down and across, as in the official code."""
    return max(1, height // side), max(1, width // side)


def copied(embeds: Tensor, ids: Tensor, counts: tuple[int, int], side: int) -> tuple[Tensor, Tensor]:
    """Embeddings [1, T, C] and ids [T, 3] of all copies."""
    places = [(down, across) for down in range(counts[0]) for across in range(counts[1])]
    moved = [ids.float() + torch.tensor([0.0, side * down, side * across]) for down, across in places]
    return torch.cat([embeds] * len(places), dim=1), torch.cat(moved)


class CopiesProcessor(DenseClearProcessor):
    """All see all copies where `sees_all`; else an image token that of its block, and a copy itself and its block."""

    def __init__(self, height: int, width: int, *arguments: Any, side: int, sees_all: bool, **settings: Any) -> None:
        super().__init__(height, width, *arguments, **settings)
        down, across = counts_of(height, width, side)
        self.copies, self.sees_all = down * across, sees_all
        self.block_of = torch.tensor(
            [
                min(y // side, down - 1) * across + min(x // side, across - 1)
                for y in range(height)
                for x in range(width)
            ]
        )

    def text_counted(self, text: int) -> tuple[int, int]:
        one = text // self.copies
        return text if self.sees_all else one, one

    def text_seen(self, text: int) -> Tensor:
        if self.sees_all:
            return super().text_seen(text)
        copy_of = torch.arange(self.copies).repeat_interleave(text // self.copies)
        return self.block_of[:, None] == copy_of

    def _text_output(self, query: Tensor, key: Tensor, value: Tensor, text: int) -> Tensor:
        if self.sees_all:
            return super()._text_output(query, key, value, text)
        copy_of = torch.arange(self.copies).repeat_interleave(text // self.copies)
        return softmax_attention(query, key, value, copy_of[:, None] == torch.cat([copy_of, self.block_of]))


class PooledCopies(CopiesProcessor, Pooled):
    """With down-sampled keys."""
