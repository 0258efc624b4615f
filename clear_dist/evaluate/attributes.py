"""What pictures of the demo's landscapes show, read by a small network that its own renderer has taught.

It tells how often a drawn picture shows what its prompt asked for. `python -m clear_dist.evaluate.teach` makes its
weights anew.
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from clear_dist.demo.grammar import CHOICES, Landscape, parsed

WEIGHTS = Path(__file__).with_name("attributes.safetensors")
SIDE = 64
"""Pixels that a picture is averaged to."""
WORDS: dict[str, tuple[str | None, ...]] = {**CHOICES, "trees": ("pine", None)}
"""What each attribute may be in a picture."""


class Reader(nn.Sequential):
    """Scores of all words, [B, words], for pictures [B, 3, SIDE, SIDE] from 0 to 1."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 16), (16, 32), (32, 48)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        words = sum(map(len, WORDS.values()))
        super().__init__(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48 * 16, words))


def as_seen(pictures: Tensor) -> Tensor:
    """Pictures [B, 3, SIDE, SIDE] from 0 to 1, of bytes [B, H, W, 3]."""
    return functional.interpolate(pictures.movedim(-1, 1).float() / 255, size=(SIDE, SIDE), mode="area")


@torch.inference_mode()
def read(pictures: Tensor) -> list[Landscape]:
    """What each of some pictures, bytes [B, H, W, 3], shows."""
    scores = _reader()(as_seen(pictures)).split([len(words) for words in WORDS.values()], dim=1)
    best = [each.argmax(1).tolist() for each in scores]
    return [
        Landscape(**{name: words[index] for (name, words), index in zip(WORDS.items(), row, strict=True)})
        for row in zip(*best, strict=True)
    ]


def accuracy(pictures: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """Share of pictures, bytes [B, H, W, 3], that show what their prompts name: by attribute, and `all` together.

    Attributes that no prompt names are left out. No trees are asked for by naming the rest.
    """
    right: dict[str, list[bool]] = {}
    for shown, prompt in zip(read(pictures), prompts, strict=True):
        asked = asdict(parsed(prompt)[0])
        found = asdict(shown)
        for name, word in asked.items():
            if word is not None:
                right.setdefault(name, []).append(found[name] == word)
    shares = {name: sum(each) / len(each) for name, each in right.items()}
    together = [each for several in right.values() for each in several]
    return shares | ({"all": sum(together) / len(together)} if together else {})


@cache
def _reader() -> Reader:
    reader = Reader()
    reader.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS).items()})
    return reader.eval()
