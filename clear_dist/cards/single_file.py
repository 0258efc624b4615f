"""Single-file checkpoints, as Black Forest Labs and ComfyUI publish them, by their headers; without torch.

Their layers often are several of diffusers' whose outputs follow each other: the same table as for LoRA tells which.
diffusers' own converters say the same, but copy what they cut, in each rank, and some know one width only.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from clear_dist.cards.card import Card, LoraLayer, TransformerShape
from clear_dist.cards.clear import Shapes, require_same_tensors
from clear_dist.cards.headers import component_files, read_component, read_tensors
from clear_dist.options import Refusal

WITHIN = {"transformer": ("model.diffusion_model.", "diffusion_model."), "vae": ("first_stage_model.", "vae.")}
"""Where parts begin in files that hold all of a model; text encoders: `text_encoders.<name>.transformer.`."""
SCALED = re.compile(
    r"scaled_fp8|.+\.(scale_weight|weight_scale(_2)?|scale_input|input_scale|comfy_quant|absmax)|.+\.quant_state\..+"
)
"""Tensors beside weights that are numbers only together with them."""
EMBEDDINGS = (
    "text_model.embeddings.token_embedding.weight", "shared.weight", "encoder.embed_tokens.weight",
    "model.embed_tokens.weight", "embed_tokens.weight",
)  # fmt: skip
"""Text encoders' tables of tokens, [words, channels]."""


@dataclass(frozen=True, kw_only=True)
class PartFile:
    """A part of a model in a file: all tensors whose names begin with `prefix`."""

    file: Path
    prefix: str = ""

    def shapes(self) -> Shapes:
        """Shapes by name, without the prefix; raises a Refusal as `read_tensors`, and for quantised weights."""
        found = {}
        for full, (dtype, shape) in read_tensors(self.file).items():
            name = full.removeprefix(self.prefix)
            if not full.startswith(self.prefix):
                continue
            if SCALED.fullmatch(name) or (dtype.startswith(("I", "U")) and name.endswith(".weight")):
                got = f"got {full} ({dtype}) in {self.file}"
                raise Refusal(f"single files must have plain numbers, {got}; nearest: the 16-bit file, with --int8")
            found[name] = shape
        return found


Files = Mapping[str, PartFile]
"""Parts of a model that are not in its folder."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows of a tensor in a file that are one of the transformer's; `is_swapped`: the halves in the other order."""

    name: str
    rows: slice
    is_swapped: bool = False


Layout = Mapping[str, tuple[Piece, ...]]
"""Pieces by a tensor's name in the file."""


def layout_of(source: PartFile, card: Card, shape: TransformerShape) -> Layout:
    """Where a transformer's tensors are; raises as `shapes`, and a Refusal where the file has not those of `shape`."""
    tensors, layers = source.shapes(), shape.lora_layers()
    layout = {name: tuple(_pieces(name, card, layers)) for name in tensors}
    found = {
        piece.name: (*(len(range(size[0])[piece.rows]) for _ in size[:1]), *size[1:])
        for name, size in tensors.items()
        for piece in layout[name]
    }
    require_same_tensors(shape.tensors(), found, source.file)
    return {source.prefix + name: pieces for name, pieces in layout.items()}


def fits(source: PartFile, card: Card, shape: TransformerShape) -> bool:
    """Whether the file has the layout of that transformer."""
    try:
        layout_of(source, card, shape)
    except Refusal:
        return False
    return True


def is_like(source: PartFile, card: Card, shape: TransformerShape) -> bool:
    """Whether the file has the layout of such a transformer of any size."""
    layers = shape.lora_layers()
    names = {piece.name for name in source.shapes() for piece in _pieces(name, card, layers)}
    return _numberless(names) == _numberless(shape.tensors())


def part_in(file: Path, names: Collection[str], part: str, name: str | None = None) -> PartFile | None:
    """The part of a file with tensors `names`, as all-in-one files have it; None: it has none of it."""
    prefixes = WITHIN.get(part, (f"text_encoders.{name}.transformer.", f"text_encoders.{name}."))
    prefix = next((each for each in prefixes if any(tensor.startswith(each) for tensor in names)), None)
    return None if prefix is None else PartFile(file=file, prefix=prefix)


def weight_files(folder: Path, card: Card, part: str, files: Files) -> list[Path]:
    """Files of a part's weights; raises as `component_files`."""
    return [files[part].file] if part in files else component_files(folder / part, card.weights[part])


def weight_shapes(folder: Path, card: Card, part: str, files: Files) -> Shapes:
    """Shapes of a part's weights by name, as the file has them; raises as `read_component`."""
    return files[part].shapes() if part in files else read_component(folder / part, card.weights[part])


def check_other_part(part: str, source: PartFile, channels: int) -> None:
    """Raises a Refusal unless the file holds a VAE of so many latent channels, or a text encoder so wide."""
    tables, axis = (("decoder.conv_in.weight",), 1) if part == "vae" else (EMBEDDINGS, -1)
    shapes = source.shapes()
    got = next((shapes[name] for name in tables if name in shapes), None)
    if got is None or len(got) < 2 or got[axis] != channels:
        found = f"without {tables[0]}" if got is None else f"with {got[axis] if len(got) > 1 else 0}"
        raise Refusal(f"the {part} must have {channels} channels, got {source.file} {found}; is it another model's?")


def _numberless(names: Iterable[str]) -> set[str]:
    return {re.sub(r"\.\d+\.", ".#.", name) for name in names}


def _pieces(name: str, card: Card, layers: Mapping[str, LoraLayer]) -> Iterator[Piece]:
    module, _, kind = name.rpartition(".")
    layer = layers.get(module.replace(".", "_")) if kind in ("weight", "bias") else None
    if layer is None:
        renamed = next((re.sub(old, new, name) for old, new in card.originals.items() if re.fullmatch(old, name)), name)
        if renamed:
            yield Piece(name=renamed, rows=slice(None))
        return
    start, modules = 0, list(layer.modules.items())
    for module, rows in modules:
        end = None if module == modules[-1][0] else start + rows  # the last one shows rows that are too many
        yield Piece(name=f"{module}.{kind}", rows=slice(start, end), is_swapped=layer.is_swapped)
        start += rows
