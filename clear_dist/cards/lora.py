"""Files of LoRA by their headers, without torch: which layers of a model they adapt, in any spelling in use.

diffusers and peft write `transformer.transformer_blocks.0.attn.to_q.lora_A.weight`, ComfyUI
`diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight`, kohya's scripts and OneTrainer the same with
underscores (`lora_unet_double_blocks_0_img_attn_qkv`), XLabs `double_blocks.0.processor.qkv_lora1.down.weight`. A
model's card has the names of its transformer's layers; those of text encoders are their modules'.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clear_dist.cards.card import LoraLayer
from clear_dist.cards.clear import Shapes
from clear_dist.cards.headers import read_header, read_json
from clear_dist.options import Refusal, shortened

Layers = Mapping[str, LoraLayer | None]
"""Layers of a part by their names, with underscores for dots; None: of unknown size."""
PEFT_FILE, PEFT_SETTINGS = "adapter_model.safetensors", "adapter_config.json"
PREFIX = re.compile(
    r"lora_(?:unet|transformer)_|lycoris_|(?:(?:base_model\.model|(?:model\.)?diffusion_model|transformer)\.)*"
)
TEXT_PREFIX = re.compile(r"(?:lora_te|text_encoder_?)(\d?)[._]|text_encoders\.(clip_l|clip_g|t5xxl)\.transformer\.")
TENSOR = re.compile(
    r"(.+?)\.(?:"
    r"(?P<down>lora_A(?:\.[^.]+)?\.weight|(?:lora[._]|lora_linear_layer\.)?down\.weight)|"
    r"(?P<up>lora_B(?:\.[^.]+)?\.weight|(?:lora[._]|lora_linear_layer\.)?up\.weight)|"
    r"(?P<bias>lora_B(?:\.[^.]+)?\.bias)|(?P<diff_b>diff_b)|(?P<alpha>alpha)|"
    r"(?P<magnitude>lora_magnitude_vector(?:\.[^.]+){0,2}|dora_scale))"
)
"""Layer and kind of a tensor: `down` reads and `up` writes; there are two kinds of biases; `magnitude` makes a DoRA."""
NO_LINEAR = re.compile(r"embed|shared|relative_attention_bias")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The LoRA of one layer."""

    part: str
    layer: LoraLayer | None
    """None: unknown."""
    tensors: Mapping[str, str]
    """Names in the file, by kind."""
    rank: int
    alpha: float
    """From the file's settings; a tensor `alpha` comes first."""


def read_pairs(file: Path, parts: Mapping[str, Layers | None]) -> list[Pair]:
    """All of a LoRA's file; raises as `read_tensors`, and a Refusal unless every tensor has its place in the model.

    Args:
        parts: layers of the transformer, then of text encoders in the model's order; None: unknown, anything passes.
    """
    tensors, metadata = read_header(file)
    if not tensors:
        raise Refusal(f"--lora must hold the layers of a LoRA, got the empty file {file}")
    for name, (dtype, _) in tensors.items():
        if not name.isprintable():
            raise Refusal(f"tensors of a LoRA must have names that can be printed, got {name!r} in {file}")
        if not dtype.startswith(("F", "BF")):
            raise Refusal(f"a LoRA must hold floating-point numbers, got {dtype} in {name} of {file}")
    reader = _Reader(file, parts, {name: shape for name, (_, shape) in tensors.items()}, _settings(file, metadata))
    pairs = [reader.pair(*layer, names) for layer, names in reader.by_layer().items()]
    modules: dict[tuple[str, str], Pair] = {}
    for pair in pairs:
        for module in () if pair.layer is None else pair.layer.modules:
            other = modules.setdefault((pair.part, module), pair)
            if other is not pair:
                raise _double(other.tensors["up"], pair.tensors["up"], file)
        first = next(each for each in pairs if each.part == pair.part)
        if ("magnitude" in pair.tensors) != ("magnitude" in first.tensors):
            raise Refusal(f"{file} must have magnitudes of all layers, or of none, got {pair.tensors['up']}")
    return pairs


def linear_layers(shapes: Shapes) -> dict[str, LoraLayer]:
    """Layers of a text encoder that a LoRA may adapt, by the shapes of its weights."""
    modules = {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and not NO_LINEAR.search(name)
    }
    return {_flat(name): LoraLayer(modules={name: shape[0]}, inputs=shape[1]) for name, shape in modules.items()}


@dataclass(frozen=True)
class _Reader:
    file: Path
    parts: Mapping[str, Layers | None]
    shapes: Shapes
    settings: Mapping[str, Any]

    def by_layer(self) -> dict[tuple[str, str], dict[str, str]]:
        """Names of tensors by part and layer, then by kind."""
        found: dict[tuple[str, str], dict[str, str]] = {}
        for name in self.shapes:
            part, match = self._part(name)
            if match is None or match.lastgroup is None:
                got = f"{shortened(name)} in {self.file}"
                raise Refusal(f"--lora takes LoRA and DoRA of linear layers and nothing else, got {got}")
            names = found.setdefault((part, _flat(match[1])), {})
            if match.lastgroup in names:
                raise _double(names[match.lastgroup], name, self.file)
            names[match.lastgroup] = name
        return found

    def pair(self, part: str, name: str, tensors: Mapping[str, str]) -> Pair:
        layers, layer = self.parts[part], None
        if layers is not None:
            if name not in layers:
                got = shortened(TENSOR.sub(r"\1", next(iter(tensors.values()))))
                raise Refusal(f"{self.file} adapts {got}, which this model has not; is it for another model?")
            layer = layers[name]
        for kind, tensor in tensors.items():
            self._check_size(kind, tensor, layer)
        if missing := {"down", "up"} - tensors.keys():
            lacks = " and ".join({"down": "A (down)", "up": "B (up)"}[kind] for kind in sorted(missing))
            got = next(iter(tensors.values()))
            raise Refusal(f"a LoRA has two matrices for each layer, got {got} without {lacks} in {self.file}")
        if "magnitude" in tensors and tensors.keys() & {"bias", "diff_b"}:  # peft has no such
            raise Refusal(f"a DoRA must have no biases, got {tensors['magnitude']} with one in {self.file}")
        rank = self._rank(tensors)
        module = name if layer is None else next(iter(layer.modules))
        return Pair(part=part, layer=layer, tensors=tensors, rank=rank, alpha=self._alpha(part, module, rank))

    def _part(self, name: str) -> tuple[str, re.Match[str] | None]:
        """The part that a tensor is for, and what is left of its name."""
        parts, text = list(self.parts), TEXT_PREFIX.match(name)
        if text is None:
            prefix = PREFIX.match(name)
            return parts[0], TENSOR.fullmatch(name, 0 if prefix is None else prefix.end())
        number = {"clip_g": 2, "t5xxl": len(parts)}.get(text[2], int(text[1] or 1))  # the last one may have several
        return parts[min(number, len(parts) - 1)], TENSOR.fullmatch(name, text.end())

    def _check_size(self, kind: str, tensor: str, layer: LoraLayer | None) -> None:
        shape = self.shapes[tensor]
        got = (shape or (0,))[-1 if kind == "down" else 0]
        if kind == "alpha":
            expected, got, ends = 1, math.prod(shape), "number"
        elif layer is None:
            return
        else:
            expected, ends = (layer.inputs, "inputs") if kind == "down" else (layer.outputs, "outputs")
        is_matrix = kind in ("down", "up")
        if got != expected or (not is_matrix and math.prod(shape) != expected):
            raise Refusal(f"{tensor} must have {expected} {ends}, got {got} in {self.file}; is it for another model?")

    def _rank(self, tensors: Mapping[str, str]) -> int:
        down, up = self.shapes[tensors["down"]], self.shapes[tensors["up"]]
        if len(down) != 2 or len(up) != 2 or down[0] != up[1] or not down[0]:
            raise Refusal(
                f"matrices of a LoRA must be of one rank, got {list(down)} and {list(up)} for {tensors['down']} and "
                f"{tensors['up']} in {self.file}; download it again"
            )
        return down[0]

    def _alpha(self, part: str, module: str, rank: int) -> float:
        """Alpha by peft's settings."""
        start = f"{part}."
        own = {name.removeprefix(start): value for name, value in self.settings.items() if name.startswith(start)}
        try:
            patterns = own.get("alpha_pattern") or {}
            found = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
            alpha = float(next(found, own.get("lora_alpha", rank)))
            if not math.isfinite(alpha):
                raise ValueError(f"an alpha of {alpha}")
            return alpha * math.sqrt(rank) if own.get("use_rslora") else alpha
        except (AttributeError, TypeError, ValueError, re.error) as error:
            raise Refusal(f"settings of a LoRA must be peft's, got others in {self.file} ({error})") from error


def _settings(file: Path, metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """Settings that diffusers writes into a file, or peft beside it, by part."""
    beside = file.with_name(PEFT_SETTINGS)
    if file.name == PEFT_FILE:
        if not beside.is_file():
            raise Refusal(f"{file} must have {PEFT_SETTINGS} beside it, which has its scale; download it too")
        return {f"transformer.{name}": value for name, value in read_json(beside).items()}
    try:
        return dict(json.loads(metadata.get("lora_adapter_metadata", "{}")))
    except (TypeError, ValueError, RecursionError) as error:
        raise Refusal(f"settings of a LoRA must be a JSON object, got others in {file} ({error})") from error


def _double(first: str, second: str, file: Path) -> Refusal:
    return Refusal(f"a layer must have one LoRA in a file, got {first} and {second} in {file}; nearest: two files")


def _flat(layer: str) -> str:
    """Name in the table: text encoders of some versions of transformers have `text_model` around them."""
    return layer.replace(".", "_").removeprefix("text_model_")
