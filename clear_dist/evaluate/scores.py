"""How alike pictures are, by torchmetrics, an extra (`pip install 'clear-dist[evaluate]'`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

from torch import Tensor

from clear_dist.options import Refusal

SMALLEST = 161
"""Pixels of the shorter side, for the five scales of MS-SSIM."""


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """Scores of each picture against its reference; see `likeness`."""

    psnr: tuple[float, ...]
    """dB; infinite where a picture is its reference."""
    ssim: tuple[float, ...]
    ms_ssim: tuple[float, ...] | None
    """None: the pictures are smaller than SMALLEST."""

    def summary(self) -> dict[str, float]:
        """Medians, and the worst picture's."""
        named = {"psnr": self.psnr, "ssim": self.ssim, "ms_ssim": self.ms_ssim or ()}
        found = {name: values for name, values in named.items() if values}
        return {name: median(each) for name, each in found.items()} | {f"worst_{n}": min(v) for n, v in found.items()}


def likeness(pictures: Tensor, references: Tensor) -> Likeness:
    """PSNR and SSIM, also at several scales, of pictures, bytes [B, H, W, 3], to references like them.

    SSIM is computed in float32, within 1e-4. Raises a Refusal where torchmetrics is missing, ValueError for other
    shapes.
    """
    if pictures.shape != references.shape or pictures.ndim != 4 or not len(pictures):
        raise ValueError(f"pictures must be [B, H, W, 3] like their references, got {pictures.shape, references.shape}")
    with _installed():
        from torchmetrics.functional import image as metrics
    drawn, expected = (each.movedim(-1, 1).double() / 255 for each in (pictures, references))
    given: dict[str, Any] = {"data_range": 1.0, "reduction": "none"}
    psnr = metrics.peak_signal_noise_ratio(drawn, expected, dim=(1, 2, 3), **given)
    drawn, expected = drawn.float(), expected.float()  # convolutions in double take twelve times as long
    ssim: Any = metrics.structural_similarity_index_measure(drawn, expected, **given)
    scaled: Any = None
    if min(drawn.shape[-2:]) >= SMALLEST:
        scaled = metrics.multiscale_structural_similarity_index_measure(drawn, expected, **given)
    return Likeness(psnr=_numbers(psnr), ssim=_numbers(ssim), ms_ssim=None if scaled is None else _numbers(scaled))


def _numbers(values: Tensor) -> tuple[float, ...]:
    return tuple(values.reshape(-1).tolist())


@contextmanager
def _installed() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        rule = "scores need the package torchmetrics, which is not installed"
        raise Refusal(f"{rule} ({error}); nearest: pip install 'clear-dist[evaluate]'") from error
