"""The embedded demo model, a small trained pipeline in FLUX's architecture that draws landscapes; light to import."""

from collections.abc import Iterable
from pathlib import Path

from clear_dist.demo.grammar import DEFAULT_PROMPT, parse

WEIGHTS = Path(__file__).parent / "weights"
CLEAR_WEIGHTS = WEIGHTS / "clear_local_8.safetensors"
WINDOW = 8  # the radius, in tokens, that CLEAR_WEIGHTS was tuned for
NATIVE_SIZE = 256
DEFAULT_STEPS = 20
DEFAULT_MAX_SEQUENCE_LENGTH = 32
DEFAULT_TRUE_CFG_SCALE = 3.0  # with negative prompt "": twice the work, and much more faithful to the prompt

DEFAULT_STRENGTH = 0.3  # of the upper stages of a cascade; from 0.5 on it invents a second moon
LATER_BLOCKS = ("single_transformer_blocks.4.", "single_transformer_blocks.5.")

__all__ = [
    "CLEAR_WEIGHTS", "DEFAULT_MAX_SEQUENCE_LENGTH", "DEFAULT_PROMPT", "DEFAULT_STEPS", "DEFAULT_STRENGTH",
    "DEFAULT_TRUE_CFG_SCALE", "NATIVE_SIZE", "WEIGHTS", "WINDOW", "first_version",
    "parse",
]  # fmt: skip


def first_version(tensors: Iterable[str]) -> set[str]:
    """Names of the tensors that the first version of the embedded model had too: it had two blocks fewer."""
    return {name for name in tensors if not name.startswith(LATER_BLOCKS)}
