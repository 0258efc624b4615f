"""LoRA before anything is loaded: where they are and, by their headers, whether they fit the model; without torch."""

import math
import os
import re
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
from clear_dist.request.request import Lora, Request
from clear_dist.stages import AtStages, check_adapter

DEFAULT_FILE = "pytorch_lora_weights.safetensors"
WEIGHTS = (-10.0, 10.0)
STAGES = re.compile(r"(.+)@(upper|-?\d{1,9})")
"""What is named, and the stages that it is for; other words after an @ are revisions on the hub."""
NOT_WITH_DORA = ("float8", "int8", "shard_weights", "hoist_modulation")
"""Options under which a layer's weights are not there as peft wants to measure them."""


def find_loras(
    words: Iterable[str] | None, facts: ModelFacts, cards: Cards, options: Options, *, in_cascade: bool = True
) -> tuple[Lora, ...]:
    """LoRA that `--lora` names; raises a Refusal where one is missing, damaged, pickled or for another model.

    Those with short names are for upper stages where the picture is drawn `in_cascade`, and nothing else was asked for.
    """
    found = tuple(_found(word, facts, cards, in_cascade) for word in words or ())
    compare_loras(found, facts, cards, options)
    if found and find_spec("peft") is None:
        raise Refusal("--lora needs the package peft, which is not installed; nearest: pip install peft")
    return found


def compare_loras(loras: Iterable[Lora], facts: ModelFacts, cards: Cards, options: Options) -> None:
    """Compare local files with the model, as far as it is known; raises as `read_pairs`.

    Where the model's numbers are unknown, layers of any known one pass, and sizes are not checked. Raises a Refusal,
    too, for a DoRA under options of which it cannot see the weights, and for some stages' LoRA of text encoders.
    """
    files = [(Path(lora.source), lora.stages) for lora in loras if os.path.isfile(lora.source)]
    parts = parts_of(facts, cards) if files else {}
    other = next((spelled(name) for name in NOT_WITH_DORA if getattr(options, name)), None)
    for file, stages in files:
        pairs = read_pairs(file, parts)
        if stages is not None and any(pair.part != "transformer" for pair in pairs):
            rule = f"{file} is for text encoders too, which read the prompt once for all stages"
            raise Refusal(f"{rule}, got @{stages}; nearest: without @{stages}")
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


def check_stages(request: Request) -> None:
    """Raises a Refusal where a LoRA is for stages that none of the pictures has, as far as they are known."""
    stages = [stage for index in request.differing for stage in request.alone(index).stages]
    for lora in request.loras:
        try:
            if lora.stages is not None:
                check_adapter(stages, lora.stages)
        except ValueError as error:
            raise Refusal(f"--lora {shortened(lora.without_folders().source)}@{lora.stages}: {error}") from error


def _found(word: str, facts: ModelFacts, cards: Cards, in_cascade: bool) -> Lora:
    named, stages = _staged(word)
    source, weight = _parted(named)
    path = Path(source).expanduser()
    if source and os.path.exists(path):
        return Lora(source=str(_in_folder(path) if path.is_dir() else path), weight=weight, stages=stages)
    if (published := _published(source, facts, cards)) is not None:
        usual: AtStages | None = "upper" if in_cascade else None
        return Lora(source=published, weight=weight, stages=usual if stages is None else stages)
    on_hub = HubFile.of(source, default=DEFAULT_FILE)
    if on_hub is None or on_hub.repository.endswith(".safetensors") or not on_hub.file.endswith(".safetensors"):
        raise Refusal(
            "--lora must be a safetensors file, a folder, a hub id owner/name[:file] or "
            f"{' or '.join(_short_names(cards))}, with or without :WEIGHT, @upper or @PIXELS; "
            f"there is no {shortened(source)!r}"
        )
    return Lora(source=str(on_hub), weight=weight, stages=stages)


def _short_names(cards: Cards) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for _, known in cards.hub_models for name in known.loras))


def _published(name: str, facts: ModelFacts, cards: Cards) -> str | None:
    """The hub file that a short name means with this model; None: there is no such name."""
    fitting = [known for _, known in cards.hub_models if name in known.loras]
    if not fitting:
        return None
    found = next((known.loras[name] for known in fitting if known.shape == facts.shape), None)
    if found is None:
        models = " and ".join(known.id for known in fitting)
        raise Refusal(f"--lora {name} is for {models}, got {facts.name}; nearest: --lora {fitting[0].loras[name]}")
    return found


def _staged(word: str) -> tuple[str, AtStages | None]:
    """What comes before the stages, and these."""
    match = None if os.path.exists(Path(word).expanduser()) else STAGES.fullmatch(word)
    if match is None:
        return word, None
    return match[1], "upper" if match[2] == "upper" else int(match[2])


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
