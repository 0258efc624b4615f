"""Weights of the reader of attributes, from renders; `--output FILE`, a few minutes on two CPU cores."""

import argparse
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from clear_dist.demo.data import HELD_OUT_SEED, TRAINING_SEED, scene
from clear_dist.demo.grammar import Landscape
from clear_dist.evaluate.attributes import SIDE, WEIGHTS, WORDS, Reader, as_seen

SCENES, HELD_OUT, RENDERED = 6_000, 300, 2 * SIDE
STEPS, BATCH, RATE = 2_500, 64, 2e-3
BLUR, NOISE, GAIN = 1.2, 0.04, 0.1
"""Pixels, and shares of white: a model's pictures are softer than renders."""


def scenes(first: int, count: int) -> tuple[Tensor, Tensor]:
    """Pictures as the reader sees them, and the index of each attribute's word, [B, attributes]."""
    words, pictures = zip(*(scene(first + index, RENDERED) for index in range(count)), strict=True)
    return as_seen(torch.from_numpy(np.stack(pictures))), torch.tensor([list(map(_indices, words))]).squeeze(0)


def _indices(words: Landscape) -> list[int]:
    return [WORDS[name].index(word) for name, word in asdict(words).items()]


def spoilt(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Blurred, with noise and another brightness."""
    sigma = BLUR * torch.rand((), generator=generator) + 1e-3
    kernel = torch.exp(-((torch.arange(-3.0, 4) / sigma) ** 2) / 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, 7)
    blurred = functional.conv2d(functional.pad(pictures, (3, 3, 3, 3), mode="replicate"), kernel, groups=3)
    blurred = functional.conv2d(blurred, kernel.transpose(2, 3), groups=3)
    gain = 1 + GAIN * torch.randn(len(pictures), 1, 1, 1, generator=generator)
    return blurred * gain + NOISE * torch.randn(pictures.shape, generator=generator)


def loss_of(scores: Tensor, indices: Tensor) -> Tensor:
    parts = scores.split([len(words) for words in WORDS.values()], dim=1)
    return sum((functional.cross_entropy(part, indices[:, at]) for at, part in enumerate(parts)), torch.zeros(()))


def teach(pictures: Tensor, indices: Tensor, *, steps: int = STEPS) -> Reader:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    reader = Reader()
    optimiser = torch.optim.AdamW(reader.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(pictures), (BATCH,), generator=generator)
        loss = loss_of(reader(spoilt(pictures[chosen], generator)), indices[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return reader.eval()


@torch.inference_mode()
def shares_right(reader: Reader, pictures: Tensor, indices: Tensor) -> dict[str, float]:
    parts = reader(pictures).split([len(words) for words in WORDS.values()], dim=1)
    right = (part.argmax(1) == indices[:, at] for at, part in enumerate(parts))
    return {name: float(each.float().mean()) for name, each in zip(WORDS, right, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    output = parser.parse_args().output
    reader = teach(*scenes(TRAINING_SEED, SCENES))
    held_out = scenes(HELD_OUT_SEED, HELD_OUT)
    soft = spoilt(held_out[0], torch.Generator().manual_seed(1)), held_out[1]
    print("held out:", shares_right(reader, *held_out), "spoilt:", shares_right(reader, *soft))
    save_file({name: tensor.half() for name, tensor in reader.state_dict().items()}, output)


if __name__ == "__main__":
    main()
