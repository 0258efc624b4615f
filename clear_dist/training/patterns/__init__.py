"""Who attends to whom, in training: CLEAR's circle, and what the paper compares it with; a row each.

A pattern is a file beside this one, with a class that answers `Pattern` of `training/attention.py`, and a row here.
"""

from collections.abc import Callable, Mapping

from clear_dist.training.attention import Pattern
from clear_dist.training.patterns.circle import Circle

PATTERNS: Mapping[str, Callable[..., Pattern]] = {"circle": Circle}
"""By name; made of the pattern's own settings, by keyword."""
