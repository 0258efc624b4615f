"""LoRA before anything is loaded: where its files are and, by their headers, whether they fit the model. No torch here.

Files name layers as diffusers does (`transformer.transformer_blocks.0.attn.to_q.lora_A.weight`), or as kohya's scripts
and the original FLUX do (`lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight`). Both are looked up in one table.
"""

import math
import os
import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from clear_dist.cards.clear import Shapes
from clear_dist.cards.folder import ModelFacts
from clear_dist.cards.headers import read_shapes
from clear_dist.families.flux.card import FLUX_DEV, FLUX_SCHNELL, MLP_RATIO, TIME_CHANNELS, FluxShape
from clear_dist.options import Refusal, shortened
from clear_dist.request.request import Lora

DEFAULT_FILE = "pytorch_lora_weights.safetensors"
HUB = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w./-]+\.safetensors))?", re.ASCII)
WEIGHTS = (-10.0, 10.0)
PREFIXES = re.compile(r"^(transformer\.|diffusion_model\.|base_model\.model\.|lora_unet_|lora_transformer_)")
PART = re.compile(r"(.+?)\.(?:lora_([AB])(?:\.default)?|lora[._](down|up))\.(weight|bias)")
TEXT_ENCODER = ("text_encoder.", "lora_te")
XLABS = re.compile(r"(diffusion_model\.)?(double|single)_blocks\.\d+\.processor\.")
"""Named by their attention, not by layers: what fits is known once diffusers has renamed them."""


def find(words: Iterable[str] | None, facts: ModelFacts) -> tuple[Lora, ...]:
    """The LoRA that `--lora` names, each a file, a folder or a hub id, with or without `:WEIGHT`.

    Raises:
        Refusal: there is no such file, it is damaged or pickled, or it is for another model.
    """
    found = tuple(_find(word, facts) for word in words or ())
    if found and find_spec("peft") is None:
        raise Refusal("--lora needs the package peft, which is not installed; nearest: pip install peft")
    return found


def check_located(loras: Iterable[Lora], flux: FluxShape | None) -> None:
    """Raises a Refusal where a file that lies here does not fit the model, as far as either is known by now."""
    for lora in loras:
        if os.path.isfile(lora.source):
            require_fit(read_shapes(Path(lora.source)), flux, lora.source)


def require_fit(shapes: Shapes, flux: FluxShape | None, where: Path | str) -> None:
    """Whether all tensors of a file are those of a LoRA for this model.

    Args:
        flux: None: not known yet; then layers must be among FLUX.1's, of whatever size.

    Raises:
        Refusal: a tensor is for no layer of the model, has another size, or belongs to another kind of adapter.
    """
    if not shapes:
        raise Refusal(f"--lora must hold the layers of a LoRA, got the empty file {where}")
    sizes = dict(_layers(flux or FluxShape(guidance_embeds=True)))
    for name, shape in shapes.items():
        if name.startswith(TEXT_ENCODER) or name.endswith("alpha") or XLABS.match(name):
            continue
        match = PART.fullmatch(name)
        if match is None:
            raise Refusal(f"--lora takes LoRA of linear layers and nothing else, got {shortened(name)} in {where}")
        layer, letter, direction, _ = match.groups()
        size = sizes.get(PREFIXES.sub("", layer).replace(".", "_"))
        if size is None:
            raise Refusal(f"{where} adapts {shortened(layer)}, which this model has not; is it for another model?")
        reads = letter == "A" or direction == "down"
        got, expected = (shape or (0,))[-1 if reads else 0], size[reads]
        if flux is not None and got != expected:
            ends = "inputs" if reads else "outputs"
            raise Refusal(f"{name} must have {expected} {ends}, got {got} in {where}; is it for another model?")


def _find(word: str, facts: ModelFacts) -> Lora:
    source, weight = _parted(word)
    path = Path(source).expanduser()
    if source and os.path.exists(path):
        lora = Lora(source=str(_in_folder(path) if path.is_dir() else path), weight=weight)
        known = FluxShape(guidance_embeds=True) if facts.location in (FLUX_DEV, FLUX_SCHNELL) else None
        check_located([lora], facts.flux or known)
        return lora
    on_hub = HUB.fullmatch(source)
    if on_hub is None or (source.endswith(".safetensors") and on_hub[2] is None):
        raise Refusal(
            "--lora must be a safetensors file, a folder or a hub id owner/name[:file], with or without :WEIGHT; "
            f"there is no {shortened(source)!r}"
        )
    return Lora(source=f"{on_hub[1]}:{on_hub[2] or DEFAULT_FILE}", weight=weight)


def _parted(word: str) -> tuple[str, float]:
    """Source and weight; what follows the last colon may also be a file on the hub."""
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


def _layers(flux: FluxShape) -> Iterator[tuple[str, tuple[int, int]]]:
    """Outputs and inputs of linear layers, by diffusers' names and by the original ones, underscores for dots."""
    for name, shape in flux.tensors().items():
        if name.endswith(".weight") and len(shape) == 2:
            yield name.removesuffix(".weight").replace(".", "_"), (shape[0], shape[1])
    width, hidden = flux.channels, MLP_RATIO * flux.channels
    for index in range(flux.num_layers):
        for side in ("img", "txt"):
            block = f"double_blocks_{index}_{side}"
            yield f"{block}_attn_qkv", (3 * width, width)
            yield f"{block}_attn_proj", (width, width)
            yield f"{block}_mlp_0", (hidden, width)
            yield f"{block}_mlp_2", (width, hidden)
            yield f"{block}_mod_lin", (6 * width, width)
    for index in range(flux.num_single_layers):
        block = f"single_blocks_{index}"
        yield f"{block}_linear1", (3 * width + hidden, width)
        yield f"{block}_linear2", (width, width + hidden)
        yield f"{block}_modulation_lin", (3 * width, width)
    yield "img_in", (width, flux.in_channels)
    yield "txt_in", (width, flux.joint_attention_dim)
    inputs = {"time": TIME_CHANNELS, "guidance": TIME_CHANNELS, "vector": flux.pooled_projection_dim}
    for name, channels in inputs.items():
        yield f"{name}_in_in_layer", (width, channels)
        yield f"{name}_in_out_layer", (width, width)
    yield "final_layer_linear", (flux.out_channels or flux.in_channels, width)
    yield "final_layer_adaLN_modulation_1", (2 * width, width)
