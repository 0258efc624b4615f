"""Figures of a set of pictures, as the paper's tables have them: names, and values or the reason why there is none."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True)
class Kind:
    title: str
    digits: int
    higher_is_better: bool | None
    """None: neither."""
    needs: str
    """What has to be given for it."""


PAIRS = "--against FOLDER"
KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "psnr": Kind(title="PSNR, dB", digits=2, higher_is_better=True, needs=PAIRS),
        "ssim": Kind(title="SSIM", digits=4, higher_is_better=True, needs=PAIRS),
        "ms_ssim": Kind(title="MS-SSIM", digits=4, higher_is_better=True, needs=PAIRS),
        "fid": Kind(title="FID", digits=2, higher_is_better=False, needs=f"{PAIRS} and --inception FILE"),
        "lpips": Kind(title="LPIPS", digits=4, higher_is_better=False, needs=f"{PAIRS} and --lpips FILE"),
        "clip_i": Kind(title="CLIP-I", digits=2, higher_is_better=True, needs=f"{PAIRS} and --clip FOLDER"),
        "dino": Kind(title="DINO", digits=2, higher_is_better=True, needs=f"{PAIRS} and --dino FOLDER"),
        "clip_t": Kind(title="CLIP-T", digits=2, higher_is_better=True, needs="captions and --clip FOLDER"),
        "is": Kind(title="IS", digits=2, higher_is_better=True, needs="--inception FILE"),
        "rmse": Kind(title="RMSE", digits=4, higher_is_better=False, needs="--conditions FOLDER"),
        "gflops": Kind(title="GFLOPs of attention", digits=1, higher_is_better=None, needs="--window RADIUS|full"),
    }
)
"""In the order of the paper's tables."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A value, or None and in `note` why; elsewhere `note` is what has to be said beside the value."""

    value: float | None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A row of a table, and the figures of each picture that it is the mean of."""

    pictures: str
    against: str | None
    count: int
    figures: Mapping[str, Figure]
    """One for each of KINDS."""
    of_each: Mapping[str, Mapping[str, float]]
    """By name of the picture, then of the figure."""


def mean_of(name: str, of_each: Mapping[str, Mapping[str, float]]) -> Figure | None:
    """Mean over all pictures; None: no picture has this figure."""
    values = [each[name] for each in of_each.values() if name in each]
    if not values:
        return None
    if len(values) < len(of_each):
        return Figure(value=None, note=f"{len(of_each) - len(values)} of {len(of_each)} pictures are too small for it")
    endless = sum(map(math.isinf, values))
    if endless:
        return Figure(value=None, note=f"infinite: {endless} of {len(values)} pictures equal theirs")
    return Figure(value=fmean(values))


def worst_to_best(evaluation: Evaluation) -> Sequence[str]:
    """Names of pictures by PSNR; none where nothing was compared."""
    compared = {name: each["psnr"] for name, each in evaluation.of_each.items() if "psnr" in each}
    return sorted(compared, key=compared.__getitem__)
