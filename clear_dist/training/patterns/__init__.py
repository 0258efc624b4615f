"""Who attends to whom, in training: CLEAR's circle, and what the paper compares it with; a row each.

A pattern is a file beside this one, with a class that answers `Pattern` of `training/attention.py`, a row here, and one
in `request/distill.py`, for the flag.
"""

from collections.abc import Mapping
from typing import Any

from clear_dist.request.distill import PATTERN_SIZES
from clear_dist.training.attention import Pattern
from clear_dist.training.patterns.agent import Agent
from clear_dist.training.patterns.circle import Circle
from clear_dist.training.patterns.convolved import Convolved
from clear_dist.training.patterns.linear import Linear
from clear_dist.training.patterns.neighbourhood import Neighbourhood
from clear_dist.training.patterns.sigmoid import Sigmoid
from clear_dist.training.patterns.slots import Slots
from clear_dist.training.patterns.strided import Strided
from clear_dist.training.patterns.swin import Swin

PATTERNS: Mapping[str, Any] = {
    "circle": Circle,
    "neighbourhood": Neighbourhood,
    "swin": Swin,
    "strided": Strided,
    "convolved": Convolved,
    "agent": Agent,
    "slots": Slots,
    "linear": Linear,
    "sigmoid": Sigmoid,
}
"""By name; made of the pattern's own settings, by keyword."""


def pattern_of(name: str, size: int, down_factor: int = 1) -> Pattern:
    """Pattern by name, as a recipe has it: `size` is its one size, if it has one, `down_factor` the circle's."""
    setting = PATTERN_SIZES[name]
    sizes = {} if setting is None else {setting: size}
    return PATTERNS[name](**sizes, **({"down_factor": down_factor} if down_factor > 1 else {}))
