"""Inputs as I-Max has them: in some steps patches lie half a token off, where a model can take that; copies of text."""

from collections.abc import Sequence
from typing import cast

from clear_dist.engine.cut import Cut
from clear_dist.engine.family import Family, Inputs, ShiftingFamily
from clear_dist.engine.settings import Settings
from clear_dist.engine.text_copies import with_copies


def may_shift(family: Family, settings: Settings) -> bool:
    """Whether patches can lie half a token off: a row and a column of tokens more.

    They divide by no factor of down-sampled keys, and halos that lag are of the other grid. Alike on all ranks.
    """
    return hasattr(family, "shifted") and settings.pooling is None and settings.options.schedule == "sync"


def on_grid(cut: Cut, inputs: Inputs, cuts: Sequence[Cut], family: Family) -> Inputs:
    """Inputs on the grid of `cut`, with the copies of the text that this rank holds.

    It is one of `cuts`, half a token off and as they are; none: the grid is theirs.
    """
    if cuts and cut is cuts[0]:
        inputs = cast(ShiftingFamily, family).shifted(inputs, cuts[1].size)
    return with_copies(inputs, cut.text_places, family)
