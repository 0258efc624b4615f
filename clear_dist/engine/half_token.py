"""Steps whose patches lie half a token off (I-Max): which ones, and where a model can take them."""

from collections.abc import Sequence
from typing import cast

from clear_dist.engine.cut import Cut
from clear_dist.engine.family import Family, Inputs, ShiftingFamily
from clear_dist.engine.settings import Settings


def may_shift(family: Family, settings: Settings) -> bool:
    """Whether patches can lie half a token off: a row and a column of tokens more.

    They divide by no factor of down-sampled keys, and halos that lag are of the other grid. Alike on all ranks.
    """
    return hasattr(family, "shifted") and settings.pooling is None and settings.options.schedule == "sync"


def shifted_to(cut: Cut, inputs: Inputs, cuts: Sequence[Cut], family: Family) -> Inputs:
    """Inputs on the grid of `cut`, one of `cuts`: half a token off, and as they are; none: as they are."""
    if not cuts or cut is cuts[1]:
        return inputs
    return cast(ShiftingFamily, family).shifted(inputs, cuts[1].size)
