"""Table 6 from the figures of ranks.py, the paper's beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Figures = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Printed:
    """A row of the paper's Table 6: FLUX.1-dev with r = 16 at 1024 px, N patches by Eq. 7."""

    fid: float
    lpips: float
    clip_i: float
    dino: float
    """These four against one patch."""
    clip_t: float
    inception: float

    def __str__(self) -> str:
        against_one = f"LPIPS {self.lpips}, CLIP-I {self.clip_i}, DINO {self.dino}, FID {self.fid}"
        return f"{against_one}; CLIP-T {self.clip_t}, IS {self.inception}"


PRINTED = {
    2: Printed(fid=11.55, lpips=0.51, clip_i=90.46, dino=80.89, clip_t=31.21, inception=39.26),
    4: Printed(fid=12.78, lpips=0.54, clip_i=89.74, dino=79.99, clip_t=31.27, inception=40.01),
    8: Printed(fid=14.21, lpips=0.57, clip_i=88.92, dino=78.65, clip_t=31.22, inception=39.34),
}
ONE_PATCH = "CLIP-T 30.65, IS 37.84"


def table(figures: Figures) -> str:
    """Markdown: for each number of steps a row for each weights, text reduction and schedule, a column for each N."""
    ranks = sorted({each["ranks"] for each in figures})
    parts = []
    for steps in sorted({each["steps"] for each in figures}):
        lines = [["weights", "text", "schedule", *(f"N = {size}" for size in ranks)]]
        lines.append(["---"] * len(lines[0]))
        here = [each for each in figures if each["steps"] == steps]
        lines += _rows(here, ranks)
        if steps == min(each["steps"] for each in figures):
            lines.append(_printed(ranks))
        parts.append(f"{steps} steps: {LEGEND}\n\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines))
    return "\n".join(parts)


LEGEND = (
    "median PSNR in dB against one rank with the same weights (the worst), SSIM, share of attributes shown.\n"
    "N = 1: PSNR against full attention, attributes."
)


def _rows(figures: Figures, ranks: Sequence[int]) -> list[list[str]]:
    found = {(each["weights"], each["text_attention"], each["warmup_steps"], each["ranks"]): each for each in figures}
    ways = dict.fromkeys((*each[:3],) for each in found if each[3] > 1 or max(ranks) == 1)
    rows = []
    for weights, text, warmup in ways:
        cells = [
            found.get((weights, "exact", None, size) if size == 1 else (weights, text, warmup, size)) for size in ranks
        ]
        schedule = "sync" if warmup is None else f"stale, {warmup} warm-up steps"
        rows.append([weights, text, schedule, *map(_cell, cells)])
    return rows


def _cell(each: Mapping[str, Any] | None) -> str:
    if each is None:
        return ""
    if each["psnr"] is None:
        return "NA"
    shown = f"{100 * each['attributes']:.1f} %"
    if each["ranks"] == 1:
        return shown if each["psnr_to_full"] is None else f"{each['psnr_to_full']:.1f}, {shown}"
    return f"{each['psnr']:.1f} ({each['worst_psnr']:.1f}), {each['ssim']:.3f}, {shown}"


def _printed(ranks: Sequence[int]) -> list[str]:
    cells = [ONE_PATCH if size == 1 else str(PRINTED.get(size, "")) for size in ranks]
    return ["the paper's: FLUX.1-dev, r = 16, 1024 px", "average", "sync", *cells]
