"""LoRA before anything is loaded: where they are and, by their headers, whether they fit the model; without torch."""

import math
import os
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from shlex import quote

from clear_dist.cards.card import Cards
from clear_dist.cards.folder import ModelFacts
from clear_dist.cards.hub_name import HubFile
from clear_dist.cards.lora import Layers, linear_layers, read_pairs
from clear_dist.cards.single_file import weight_shapes
from clear_dist.options import Options, Refusal, shortened, spelled
from clear_dist.request.request import Lora

DEFAULT_FILE = "pytorch_lora_weights.safetensors"
WEIGHTS = (-10.0, 10.0)
NOT_WITH_DORA = ("float8", "int8", "shard_weights", "hoist_modulation")
"""Options under which a layer's weights are not there as peft wants to measure them."""


def find_loras(words: Iterable[str] | None, facts: ModelFacts, cards: Cards, options: Options) -> tuple[Lora, ...]:
    """LoRA that `--lora` names; raises a Refusal where one is missing, damaged, pickled or for another model."""
    found = tuple(map(_found, words or ()))
    compare_loras(found, facts, cards, options)
    if found and find_spec("peft") is None:
        raise Refusal("--lora needs the package peft, which is not installed; nearest: pip install peft")
    return found


def compare_loras(loras: Iterable[Lora], facts: ModelFacts, cards: Cards, options: Options) -> None:
    """Compare local files with the model, as far as it is known; raises as `read_pairs`.

    Where the model's numbers are unknown, layers of any known one pass, and sizes are not checked. Raises a Refusal,
    too, for a DoRA under options of which it cannot see the weights.
    """
    files = [Path(lora.source) for lora in loras if os.path.isfile(lora.source)]
    parts = parts_of(facts, cards) if files else {}
    other = next((spelled(name) for name in NOT_WITH_DORA if getattr(options, name)), None)
    for file in files:
        pairs = read_pairs(file, parts)
        if other and any(pair.part == "transformer" and "magnitude" in pair.tensors for pair in pairs):
            raise Refusal(f"{file} is a DoRA, which needs plain weights, got {other}; nearest: without {other}")


def parts_of(facts: ModelFacts, cards: Cards) -> dict[str, Layers | None]:
    """Layers of transformer and text encoders, as far as they are known."""
    transformer = dict.fromkeys(cards.lora_layers) if facts.shape is None else facts.shape.lora_layers()
    parts: dict[str, Layers | None] = {"transformer": transformer}
    for card in cards.cards if facts.card is None else (facts.card,):
        for part in card.text_encoders:
            known = facts.folder is not None or part in facts.files
            shapes = weight_shapes(facts.folder or Path(), card, part, facts.files) if known else None
            parts[part] = None if shapes is None else linear_layers(shapes)
    return parts


def _found(word: str) -> Lora:
    source, weight = _parted(word)
    path = Path(source).expanduser()
    if source and os.path.exists(path):
        return Lora(source=str(_in_folder(path) if path.is_dir() else path), weight=weight)
    on_hub = HubFile.of(source, default=DEFAULT_FILE)
    if on_hub is None or on_hub.repository.endswith(".safetensors") or not on_hub.file.endswith(".safetensors"):
        raise Refusal(
            "--lora must be a safetensors file, a folder or a hub id owner/name[:file], with or without :WEIGHT; "
            f"there is no {shortened(source)!r}"
        )
    return Lora(source=str(on_hub), weight=weight)


def _parted(word: str) -> tuple[str, float]:
    """Source and weight; after the last colon there may also be a file on the hub."""
    source, colon, last = word.rpartition(":")
    if not colon or os.path.exists(Path(word).expanduser()):
        return word, 1.0
    try:
        weight = float(last)
    except ValueError:
        return word, 1.0
    low, high = WEIGHTS
    if not low <= weight <= high:
        nearest = 1.0 if math.isnan(weight) else min(max(weight, low), high)
        raise Refusal(f"--lora's weight must be from {low:g} to {high:g}, got {last}; nearest: {nearest:g}")
    return source, weight


def _in_folder(folder: Path) -> Path:
    files = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    if folder / DEFAULT_FILE in files:
        return folder / DEFAULT_FILE
    if len(files) != 1:
        got = shortened(", ".join(file.name for file in files) or "none")
        nearest = f"; nearest: --lora {quote(str(files[0]))}" if files else ""
        raise Refusal(f"--lora: {folder} must hold {DEFAULT_FILE} or one safetensors file, got {got}{nearest}")
    return files[0]
