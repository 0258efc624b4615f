"""Flags of `clear-dist evaluate`."""

from dataclasses import dataclass
from pathlib import Path

from clear_dist.options import Flags, Refusal, Window, flag, read_window, shortened
from clear_dist.request.flags import read_res
from clear_dist.request.model_flags import DEVICES

COMPARED, NETWORKS, COUNTED, TOLD = "What is compared", "Feature models", "Operations of attention", "What is told"
EVALUATE_PANELS = (COMPARED, NETWORKS, COUNTED, TOLD)
CONDITIONS = ("same", "gray")
TOKEN = 16
"""Pixels along a token's side."""
FOLDER_OR_HUB, FILE_OR_HUB = "FOLDER|HUB-ID", "FILE|HUB-ID:FILE"


@dataclass(frozen=True, kw_only=True)
class NetworkFlags(Flags):
    """Networks whose features figures need; without one its figures are left out."""

    clip: str | None = flag(None, "CLIP, for CLIP-I and CLIP-T", NETWORKS, metavar=FOLDER_OR_HUB)
    dino: str | None = flag(None, "DINOv2 or a ViT, for DINO", NETWORKS, metavar=FOLDER_OR_HUB)
    inception: str | None = flag(
        None, "Inception v3 as TorchScript (inception-2015-12-05.pt), for FID and IS", NETWORKS, metavar=FILE_OR_HUB
    )
    lpips: str | None = flag(
        None, "AlexNet or VGG16 with torchvision's names (.pth, .safetensors), for LPIPS", NETWORKS,
        metavar=FILE_OR_HUB,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvaluateFlags(NetworkFlags):
    """Raises a Refusal for flags that contradict each other, or are out of bounds."""

    pictures: Path = flag(..., "folder of pictures", is_argument=True)
    against: Path | None = flag(
        None, "folder of pictures of the same names and sizes (figures of pictures alone)", COMPARED, metavar="FOLDER"
    )
    prompts: Path | None = flag(
        None, "one prompt a line, as many as pictures, in the order of their names (NAME.txt beside each)", COMPARED,
        metavar="FILE",
    )  # fmt: skip
    conditions: Path | None = flag(
        None, "folder of pictures that led these, of the same names and sizes, for RMSE", COMPARED, metavar="FOLDER"
    )
    condition: str = flag(
        "same", "what was done to a picture to make its condition: nothing, or its luma (same)", COMPARED,
        choices=CONDITIONS,
    )  # fmt: skip
    batch: int = flag(8, "pictures at a time (8)", COMPARED, bounds=(1, 1_024))
    device: str = flag("auto", "auto: CUDA where it is", choices=DEVICES)
    window: Window | None = flag(
        None, "count a layer's attention with this radius in tokens, or full", COUNTED, metavar="RADIUS|full",
        read=read_window,
    )  # fmt: skip
    down_factor: int = flag(
        1, "tokens along the side of a down-sampled key; 1: there are none", COUNTED, bounds=(1, 64)
    )
    res: int | tuple[int, int] | None = flag(
        None, "height and width in pixels, or WIDTHxHEIGHT (the pictures')", COUNTED, read=read_res
    )
    channels: int = flag(3_072, "features of a token in attention (3072)", COUNTED, bounds=(1, 65_536))
    text_tokens: int = flag(512, "text tokens (512)", COUNTED, bounds=(0, 65_536))
    report: Path | None = flag(
        None, "figures, json; beside it csv (each picture's), md (the table), png (best, median and worst pairs)", TOLD,
        metavar="FILE",
    )  # fmt: skip
    traceback: bool = flag(False, "if it fails, show where")

    def __post_init__(self) -> None:
        super().__post_init__()
        radius = isinstance(self.window, int) and self.window >= 1
        if self.window not in (None, "full") and not radius:
            raise Refusal(
                f"--window must be a radius of at least 1 or full, got {shortened(str(self.window))}; nearest: 1"
            )
        if self.window is None and self.res is not None:
            raise Refusal("--res is the size that attention is counted for, got no --window; nearest: --window full")
        if self.condition != "same" and self.conditions is None:
            raise Refusal(f"--condition needs --conditions FOLDER, got {self.condition} alone; leave it out")
        for side in self.size or ():
            require_tokens(side, self.down_factor, "--res")

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width that attention is counted for; None: the pictures'."""
        if self.res is None:
            return None
        width, height = self.res if isinstance(self.res, tuple) else (self.res, self.res)
        return height, width


def require_tokens(side: int, down_factor: int, whose: str) -> None:
    """Raises a Refusal unless a side is made of whole tokens, and of whole down-sampled keys."""
    unit = TOKEN * down_factor
    if side < unit or side % unit:
        nearest = max(unit, (side + unit // 2) // unit * unit)
        raise Refusal(f"{whose} must be a multiple of {unit} pixels to count attention, got {side}; nearest: {nearest}")
