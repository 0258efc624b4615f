"""An evaluation: samples in batches through all scorers, then the table's figures; memory is that of a batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clear_dist.evaluate import networks
from clear_dist.evaluate.figures import KINDS, PAIRS, Evaluation, Figure, mean_of
from clear_dist.evaluate.operations import counted
from clear_dist.evaluate.scorers import Batch, Captioned, Conditions, Distribution, Perceived, Pixels, Scorer, Seen
from clear_dist.evaluate.scores import SMALLEST
from clear_dist.options import Refusal
from clear_dist.request.compared import Sample, common_size, opened
from clear_dist.request.evaluate import TOKEN, EvaluateFlags, NetworkFlags, require_tokens


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Feature networks as folders and files of this machine; None: not given."""

    clip: Path | None = None
    dino: Path | None = None
    inception: Path | None = None
    lpips: Path | None = None

    @classmethod
    def of(cls, flags: NetworkFlags) -> "Sources":
        """Fetched where they are on the hub; raises as `networks.located`."""
        kinds = {"clip": True, "dino": True, "inception": False, "lpips": False}
        words = {name: getattr(flags, name) for name in kinds}
        return cls(
            **{
                name: networks.located(f"--{name}", word, is_folder=kinds[name])
                for name, word in words.items()
                if word is not None
            }
        )


def scorers_of(sources: Sources, first: Sample, *, condition: str, device: str) -> list[Scorer]:
    """Those that the samples and the networks at hand are enough for; networks that none needs are not loaded."""
    compares, scorers = first.other is not None, list[Scorer]()
    if compares:
        scorers.append(Pixels())
    if first.condition is not None:
        scorers.append(Conditions(condition))
    if sources.lpips is not None and compares:
        scorers.append(Perceived(networks.load_perceptual(sources.lpips, device)))
    if sources.clip is not None and (compares or first.caption is not None):
        clip = networks.Clip(sources.clip, device)
        scorers.append(Captioned(clip.seen, clip.read))
    if sources.dino is not None and compares:
        scorers.append(Seen(networks.Dino(sources.dino, device).seen))
    if sources.inception is not None:
        network, features = networks.load_inception(sources.inception, device)
        scorers.append(Distribution(network, features=features, compares=compares))
    return scorers


def evaluate(flags: EvaluateFlags, samples: Sequence[Sample], device: str) -> Evaluation:
    """All figures of a set; raises a Refusal for what a scorer lacks, and for pictures that cannot be read."""
    attention = _attention(flags, samples)
    scorers = scorers_of(Sources.of(flags), samples[0], condition=flags.condition, device=device)
    of_each: dict[str, dict[str, float]] = {each.name: {} for each in samples}
    for some in in_batches(samples, flags.batch):
        batch = read(some, device)
        for scorer in scorers:
            for name, values in scorer.add(batch).items():
                for sample, value in zip(some, values, strict=True):
                    of_each[sample.name][name] = value
    of_set = {name: figure for scorer in scorers for name, figure in scorer.of_set().items()}
    found = {name: mean_of(name, of_each) or of_set.get(name) for name in KINDS} | {"gflops": attention}
    return Evaluation(
        pictures=str(flags.pictures),
        against=None if flags.against is None else str(flags.against),
        count=len(samples),
        figures={name: found[name] or Figure(value=None, note=_why_not(name, flags, samples[0])) for name in KINDS},
        of_each=of_each,
    )


def in_batches(samples: Sequence[Sample], most: int) -> Iterator[tuple[Sample, ...]]:
    """Runs of samples of one size, at most `most` at a time."""
    for _, run in groupby(samples, key=lambda each: each.size):
        while some := tuple(islice(run, most)):
            yield some


def read(samples: Sequence[Sample], device: str) -> Batch:
    """Their pictures on a device."""

    def stacked(files: Sequence[Path | None]) -> Tensor | None:
        given = [file for file in files if file is not None]
        return torch.from_numpy(np.stack([_pixels(file) for file in given])).to(device) if given else None

    pictures = stacked([each.picture for each in samples])
    assert pictures is not None
    captions = [each.caption for each in samples if each.caption is not None]
    return Batch(
        pictures=pictures,
        others=stacked([each.other for each in samples]),
        conditions=stacked([each.condition for each in samples]),
        captions=captions or None,
    )


def _pixels(file: Path) -> np.ndarray:
    """uint8 [H, W, 3] in sRGB."""
    return np.array(opened(file))


def _attention(flags: EvaluateFlags, samples: Sequence[Sample]) -> Figure | None:
    if flags.window is None:
        return None
    size = flags.size or common_size(samples)
    if size is None:
        raise Refusal("--window counts attention for one size, got pictures of several; nearest: --res 1024")
    for side in size:
        require_tokens(side, flags.down_factor, "a picture's side")
    return counted(
        (size[0] // TOKEN, size[1] // TOKEN),
        flags.window,
        down_factor=flags.down_factor,
        channels=flags.channels,
        text_tokens=flags.text_tokens,
    )


def _why_not(name: str, flags: EvaluateFlags, first: Sample) -> str:
    if name == "ms_ssim" and first.other is not None:
        return f"needs pictures of at least {SMALLEST} px"
    if name == "clip_t" and flags.clip is not None:
        return "needs captions: NAME.txt beside each picture, or --prompts FILE"
    if KINDS[name].needs.startswith(PAIRS) and first.other is None:
        return f"needs {KINDS[name].needs}"
    return f"needs {KINDS[name].needs.removeprefix(f'{PAIRS} and ')}"
