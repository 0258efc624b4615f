"""What a distilled file gives the embedded model: how often its pictures show what held-out captions ask for.

    python -m benchmarks.fidelity.distilled demo-r4/clear_local_4.safetensors [64]

With full attention, with the file's window before it was distilled, and after; also as JSON beside the file.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import clear_dist
from clear_dist import demo
from clear_dist.cards.folder import card_of
from clear_dist.comm.group import Group
from clear_dist.demo.data import HELD_OUT_SEED
from clear_dist.demo.grammar import caption, random_landscape
from clear_dist.evaluate.attributes import accuracy
from clear_dist.families.cards import CARDS
from clear_dist.options import Window
from clear_dist.weights.clear import require_radius
from clear_dist.weights.loading import load_pipeline

CPU = torch.device("cpu")
TOGETHER = 8
"""Pictures drawn at once."""


def drawn(group: Group, prompts: list[str], window: Window, file: Path | None) -> Tensor:
    """Bytes [B, H, W, 3]."""
    card = card_of(demo.WEIGHTS, CARDS)
    pipe = load_pipeline(demo.WEIGHTS, card, with_text_encoders=True, dtype=torch.float32, device=CPU)
    clear_dist.parallelize(pipe, group=group, window=window, clear_weights=file)
    pictures = [
        picture
        for first in range(0, len(prompts), TOGETHER)
        for picture in clear_dist.generate(
            pipe, prompts[first : first + TOGETHER], seed=first, num_inference_steps=demo.DEFAULT_STEPS,
            negative_prompt="", true_cfg_scale=demo.DEFAULT_TRUE_CFG_SCALE,
            max_sequence_length=demo.DEFAULT_MAX_SEQUENCE_LENGTH,
        )
    ]  # fmt: skip
    return torch.from_numpy(np.stack(pictures))


def main(file: Path, count: int) -> None:
    radius = require_radius(file)
    scenes = (random_landscape(np.random.default_rng(HELD_OUT_SEED + index)) for index in range(count))
    prompts = [caption(words) for words in scenes]
    group = Group.create(CPU)
    found: dict[str, dict[str, float]] = {}
    settings: dict[str, tuple[Window, Path | None]] = {
        "full attention": ("full", None),
        f"r = {radius} before": (radius, None),
        f"r = {radius} distilled": (radius, file),
    }
    with torch.inference_mode():
        for name, (window, weights) in settings.items():
            found[name] = accuracy(drawn(group, prompts, window, weights), prompts)
            print(name, {word: round(share, 3) for word, share in found[name].items()}, flush=True)
    file.with_suffix(".attributes.json").write_text(json.dumps({"pictures": count, "accuracy": found}, indent=2))
    group.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 64)
