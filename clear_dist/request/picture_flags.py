"""Flags of `generate` for pictures that go in beside the prompt."""

from dataclasses import dataclass
from pathlib import Path

from clear_dist.options import Flags, Refusal, flag

PICTURES = "Pictures in"
"""Panel of the help."""


@dataclass(frozen=True, kw_only=True)
class InputFlags(Flags):
    """Raises a Refusal for flags that need another one."""

    image: Path | None = flag(
        None,
        "picture to start from, with --strength of noise; some models look at it instead",
        PICTURES,
        metavar="FILE",
    )
    mask: Path | None = flag(
        None, "picture as large as --image: what is white is drawn anew, what is black stays", PICTURES, metavar="FILE"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask is not None and self.image is None:
            raise Refusal(f"--mask needs the picture that it is of, got {self.mask} alone; nearest: --image FILE")
