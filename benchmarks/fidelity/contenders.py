"""Patterns that alternatives.py compares, at which sizes, and what their attention costs."""

from dataclasses import dataclass
from statistics import mean
from typing import Any

from clear_dist import demo
from clear_dist.training.attention import Layout
from clear_dist.training.patterns import pattern_of

FLUX_TEXT, FLUX_SIDE, FLUX_CHANNELS = 512, 64, 3072


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A pattern at the size that it has at 512 px, where those of the paper, at 1024 px, halve."""

    title: str
    pattern: str
    size: int | None = None
    """None: the pattern has none."""
    paper_size: int | None = None
    printed: float | None = None
    """GFLOPs in Table 2."""

    @property
    def name(self) -> str:
        return self.pattern if self.size is None else f"{self.pattern}_{self.size}"


CONTENDERS = (
    Contender(title="sigmoid", pattern="sigmoid", printed=260.9),
    Contender(title="linear", pattern="linear", printed=174.0),
    Contender(title="PixArt-Sigma, 4 x 4", pattern="convolved", size=4, paper_size=4, printed=67.7),
    Contender(title="agent, 4 x 4", pattern="agent", size=4, paper_size=4, printed=80.5),
    Contender(title="slots, 64", pattern="slots", size=64, paper_size=256),
    Contender(title="strided, 4 x 4", pattern="strided", size=4, paper_size=4, printed=67.7),
    Contender(title="Swin, 8", pattern="swin", size=8, paper_size=16, printed=67.7),
    Contender(title="neighbourhood, r = 8", pattern="neighbourhood", size=8, paper_size=16),
    Contender(title="circle, r = 4", pattern="circle", size=4, paper_size=8, printed=63.5),
    Contender(title="circle, r = 8", pattern="circle", size=8, paper_size=16, printed=80.6),
    Contender(title="circle, r = 16", pattern="circle", size=16, paper_size=32, printed=154.1),
)
"""In Table 2's order."""


def operations(contender: Contender, side: int, config: Any) -> dict[str, float]:
    """GFLOPs of attention in a layer, here and at FLUX.1-dev's shape, the mean over layers."""
    layers = config.num_layers + config.num_single_layers
    channels = config.num_attention_heads * config.attention_head_dim
    return {
        "gflops": _gflops(contender, contender.size, side, layers, demo.DEFAULT_MAX_SEQUENCE_LENGTH, channels),
        "gflops_flux": _gflops(contender, contender.paper_size, FLUX_SIDE, 1, FLUX_TEXT, FLUX_CHANNELS),
    }


def _gflops(contender: Contender, size: int | None, side: int, layers: int, text: int, channels: int) -> float:
    pattern = pattern_of(contender.pattern, size or 1)
    layouts = (Layout(layer=layer, height=side, width=side, text_first=True) for layer in range(layers))
    return mean(pattern.operations(layout, text, 1, channels) for layout in layouts) / 1e9
