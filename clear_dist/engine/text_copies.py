"""Copies of the text, one for each block of tokens of the native size, with ids that begin at the block's (I-Max).

Under a window an image token sees the copy of its own block, and a copy's tokens see themselves and that block: with
all copies seen by all, text keys would be as many as the picture has blocks, and the work quadratic again. A rank holds
the copies of the blocks that its rows touch. With full attention all see all, as in the official code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol, cast

from clear_dist.comm.text_reduce import Reduction
from clear_dist.engine.settings import Settings
from clear_dist.geometry import CopiedText, Rows, bands_of, touched

Place = tuple[float, float]
"""Row and column in position ids."""


def may_copy(family: object, settings: Settings) -> bool:
    """Whether there can be copies: halos that lag go with a text that all ranks reduce late. Alike on all ranks."""
    return hasattr(family, "copied") and settings.options.schedule == "sync"


class Copying(Protocol):
    """A family whose text can be copied."""

    def copied(self, inputs: dict[str, Any], places: Sequence[Place]) -> dict[str, Any]:
        """Inputs with a copy of the text for each of `places`, whose ids are moved there."""


def with_copies(inputs: dict[str, Any], places: Sequence[Place], family: object) -> dict[str, Any]:
    """Inputs with a copy of the text for each place; as they are where that is one at 0."""
    return inputs if list(places) == [(0, 0)] else cast(Copying, family).copied(inputs, places)


@dataclass(frozen=True)
class Block:
    """A block of a cut's grid in tokens, of whose rows this rank has some."""

    rows: Rows
    columns: Rows
    counts_text_keys: bool
    """Whether this rank's part of the text queries' attention holds the text keys (`exact`: on one rank only)."""


@dataclass(frozen=True)
class Copies:
    """Which copies there are of one image's text, and which of them this rank holds; one block: the text itself."""

    blocks: tuple[Block, ...]
    """Those whose copies this rank holds, in raster order of the cut's grid, as the copies are."""
    held: tuple[Rows, ...]
    """Bands of blocks, by rank."""
    across: int
    """Copies of a band."""
    is_apart: bool
    """Whether an image token sees the copy of its block alone."""

    @classmethod
    def of(
        cls, stripes: Sequence[Rows], width: int, rank: int, side: int | None, reduction: Reduction, *, is_apart: bool
    ) -> "Copies":
        """Blocks of `side` x `side` tokens, the last ones larger; None: a single one."""
        bands, columns = bands_of(stripes[-1].stop, side), bands_of(width, side)
        everything = Rows(0, len(bands))
        is_apart = is_apart and len(bands) * len(columns) > 1
        held = tuple(touched(bands, stripe) if is_apart else everything for stripe in stripes)
        blocks = []
        for band, across in product(held[rank].numbers, columns):
            holders = [other for other, theirs in enumerate(held) if band in theirs.numbers]
            blocks.append(Block(bands[band], across, reduction.counts_text_keys(holders.index(rank))))
        return cls(tuple(blocks), held, len(columns), is_apart)

    @property
    def most(self) -> int:
        """Copies on the rank that holds most."""
        return self.across * max(map(len, self.held))

    def plan(self, text_tokens: int, rank: int) -> CopiedText:
        """The text in the blocks, where copies are apart."""
        return CopiedText((text_tokens * len(self.blocks),), 0, self.held, rank)
