"""Flags of `generate` for pictures that go in beside the prompt."""

from dataclasses import dataclass
from pathlib import Path

from clear_dist.options import MODEL, Flags, Refusal, Window, check_window, flag, read_window, shortened, spelled

PICTURES = "Pictures in"
"""Panel of the help."""


NEEDING_CONTROLNET = ("control_image", "control_scale", "control_mode", "controlnet_window")


@dataclass(frozen=True, kw_only=True)
class ControlFlags(Flags):
    """Raises a Refusal for flags that have no effect without a ControlNet."""

    controlnet: str | None = flag(
        None, "a ControlNet: union-pro, union-pro-2, or a folder or hub id in diffusers' layout", PICTURES,
        metavar="FOLDER|HUB-ID",
    )  # fmt: skip
    control_image: Path | None = flag(
        None, "what the ControlNet is shown, stretched to each stage's size", PICTURES, metavar="FILE", planned=False
    )
    control_scale: float | None = flag(
        None, "how much the ControlNet counts (1)", PICTURES, bounds=(0.0, 2.0), planned=False
    )
    control_mode: str | None = flag(
        None, "what --control-image is, for a union: gray, tile, blur, canny, depth, pose, low-quality, or a number",
        PICTURES, metavar="MODE", planned=False,
    )  # fmt: skip
    controlnet_window: Window | None = flag(
        None, "of the ControlNet, which CLEAR was not distilled for (full)", MODEL, metavar="RADIUS|full",
        read=read_window,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.controlnet_window, "--controlnet-window")
        for name in NEEDING_CONTROLNET if self.controlnet is None else ():
            if (value := getattr(self, name)) is not None:
                got = shortened(str(value))
                raise Refusal(f"{spelled(name)} is for ControlNets, got {got} alone; nearest: --controlnet union-pro")


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
