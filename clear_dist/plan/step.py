"""One rank's share of one pass through the transformer."""

from dataclasses import dataclass
from math import ceil

from clear_dist.plan.request import Part, PlanRequest

MOST_TOKENS = 40_960
"""Of a chunk; engine/parts.py has the same."""
FLOAT32 = 4
"""Bytes."""


@dataclass(frozen=True, kw_only=True)
class Step:
    request: PlanRequest
    part: Part
    upper: bool = False
    """Whether the stage starts from a picture."""
    lag: bool = False
    """Whether it exchanges by the stale schedule."""
    passes: int = 1
    steps: int = 1
    """Of the stage."""

    @property
    def batch(self) -> int:
        return self.request.num_images

    @property
    def text(self) -> int:
        return self.request.text_tokens

    @property
    def own_text(self) -> int:
        """Of the largest share, where ranks share the text."""
        return ceil(self.text / self.part.text_shares)

    @property
    def text_elsewhere(self) -> int:
        """Of all other shares."""
        return self.text - self.own_text

    @property
    def tokens(self) -> int:
        """That it takes through the blocks."""
        return self.own_text + self.part.tokens

    def bytes_of(self, tokens: int, units: float = 1) -> int:
        """Of so many numbers a channel of so many tokens of each picture."""
        return round(units * self.batch * tokens * self.request.model.channels * self.request.itemsize)

    def chunk_of(self, tokens: int) -> int:
        """Of so many tokens of each picture, those of the longest chunk."""
        return ceil(tokens / ceil(self.batch * tokens / MOST_TOKENS))
