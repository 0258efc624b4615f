"""LoRA before anything is loaded: where they are and, by their headers, whether they fit the model; without torch.

Files name layers as diffusers does (`transformer.transformer_blocks.0.attn.to_q.lora_A.weight`), as kohya's scripts do
(`lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight`), or as XLabs does
(`double_blocks.0.processor.qkv_lora1.down.weight`). A model's card has all these names.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path

from clear_dist.cards.card import Cards, TransformerShape
from clear_dist.cards.clear import Shapes
from clear_dist.cards.folder import ModelFacts
from clear_dist.cards.headers import read_shapes
from clear_dist.options import Refusal, shortened
from clear_dist.request.request import Lora

DEFAULT_FILE = "pytorch_lora_weights.safetensors"
HUB = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w./-]+\.safetensors))?", re.ASCII)
WEIGHTS = (-10.0, 10.0)
PREFIXES = re.compile(r"^(transformer\.|diffusion_model\.|base_model\.model\.|lora_unet_|lora_transformer_)")
PART = re.compile(
    r"(.+?)\.(?:lora_([AB])(?:\.default)?|(?:lora[._]|(?<=_lora\.)|(?<=_lora\d\.))(down|up))\.(weight|bias)"
)
"""Layer, and which half of its LoRA: A and down read, B and up write."""
TEXT_ENCODER = ("text_encoder.", "lora_te")


def find_loras(words: Iterable[str] | None, facts: ModelFacts, cards: Cards) -> tuple[Lora, ...]:
    """LoRA that `--lora` names; raises a Refusal where one is missing, damaged, pickled or for another model."""
    found = tuple(map(_found, words or ()))
    compare_loras(found, facts.shape, cards)
    if found and find_spec("peft") is None:
        raise Refusal("--lora needs the package peft, which is not installed; nearest: pip install peft")
    return found


def compare_loras(loras: Iterable[Lora], shape: TransformerShape | None, cards: Cards) -> None:
    """Compare local files with the model; raises a Refusal for a damaged one, another model's, or another adapter.

    Args:
        shape: the model's; None if unknown: layers of any known model pass, sizes are not checked.
    """
    for lora in loras:
        if os.path.isfile(lora.source):
            layers = dict.fromkeys(cards.lora_layers) if shape is None else shape.lora_layers()
            _compare(read_shapes(Path(lora.source)), layers, lora.source)


def _compare(shapes: Shapes, layers: Mapping[str, tuple[int, int] | None], where: str) -> None:
    if not shapes:
        raise Refusal(f"--lora must hold the layers of a LoRA, got the empty file {where}")
    for name, shape in shapes.items():
        if name.startswith(TEXT_ENCODER) or name.endswith("alpha"):
            continue
        match = PART.fullmatch(name)
        if match is None:
            raise Refusal(f"--lora takes LoRA of linear layers and nothing else, got {shortened(name)} in {where}")
        layer, letter, direction, _ = match.groups()
        own = PREFIXES.sub("", layer).replace(".", "_")
        if own not in layers:
            raise Refusal(f"{where} adapts {shortened(layer)}, which this model has not; is it for another model?")
        reads = letter == "A" or direction == "down"
        size, got = layers[own], (shape or (0,))[-1 if reads else 0]
        if size is not None and got != size[reads]:
            ends = "inputs" if reads else "outputs"
            raise Refusal(f"{name} must have {size[reads]} {ends}, got {got} in {where}; is it for another model?")


def _found(word: str) -> Lora:
    source, weight = _parted(word)
    path = Path(source).expanduser()
    if source and os.path.exists(path):
        return Lora(source=str(_in_folder(path) if path.is_dir() else path), weight=weight)
    on_hub = HUB.fullmatch(source)
    if on_hub is None or (source.endswith(".safetensors") and on_hub[2] is None):
        raise Refusal(
            "--lora must be a safetensors file, a folder or a hub id owner/name[:file], with or without :WEIGHT; "
            f"there is no {shortened(source)!r}"
        )
    return Lora(source=f"{on_hub[1]}:{on_hub[2] or DEFAULT_FILE}", weight=weight)


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
    files = sorted(folder.glob("*.safetensors"))
    if folder / DEFAULT_FILE in files:
        return folder / DEFAULT_FILE
    if len(files) != 1:
        got = ", ".join(file.name for file in files) or "none"
        raise Refusal(f"--lora: {folder} must hold {DEFAULT_FILE} or one safetensors file, got {shortened(got)}")
    return files[0]
