"""Single files by their headers, at the true shapes of all known models: which one it is, where its tensors are."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils
from torch import Tensor

from clear_dist.cards.card import Card, HubModel
from clear_dist.cards.single_file import PartFile, layout_of
from clear_dist.families.cards import CARDS
from clear_dist.families.flux.card import CARD as FLUX
from clear_dist.families.flux.card import FLUX_DEV
from clear_dist.launch.env import Place
from clear_dist.options import Refusal
from clear_dist.plan.model import find as planned
from clear_dist.request.flags import GenerateFlags
from clear_dist.request.settle import choose
from clear_dist.request.single_file import find
from tests import original_layout
from tests.request.test_clear_weights import sparse_checkpoint

State = dict[str, Tensor]
MAKERS: dict[str, tuple[Callable[[Mapping[str, Tensor]], State], Callable[[State], State]]] = {
    "FluxTransformer2DModel": (
        original_layout.flux,
        single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
    ),
    "Flux2Transformer2DModel": (
        original_layout.flux,
        single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers,
    ),
    "SD3Transformer2DModel": (original_layout.sd3, single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers),
    "ZImageTransformer2DModel": (
        original_layout.z_image,
        single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
    ),
}
"""Their layouts, and diffusers' converters, by class."""
PUBLISHED = {
    "flux1-dev": "flux-dev",
    "flux1-schnell": "flux-schnell",
    "flux-2-klein-4b": "flux2-klein-4b",
    "flux-2-klein-base-9b": "flux2-klein-base-9b",
    "flux2_dev": "flux2-dev",
    "sd3.5_large": "sd3.5-large",
    "sd3.5_large_turbo": "sd3.5-large-turbo",
    "sd3.5_medium": "sd3.5-medium",
    "sd3_medium": "sd3-medium",
    "z_image_turbo_bf16": "z-image-turbo",
    "z_image_bf16": "z-image",
}
"""Names of files as published, with the model's."""


def original(card: Card, known: HubModel) -> State:
    """A known model's tensors in its makers' layout, on the meta device."""
    with torch.device("meta"):
        transformer = getattr(diffusers, card.transformer)(**known.configs["transformer"])
    return MAKERS[card.transformer][0](transformer.state_dict())


@pytest.mark.parametrize(("name", "short"), PUBLISHED.items())
def test_a_file_is_known_by_its_tensors_and_its_name(tmp_path: Path, name: str, short: str) -> None:
    prefix = "model.diffusion_model." if "turbo" in name else ""
    found = CARDS.on_hub(short)
    assert found is not None
    card, known = found
    shapes = {prefix + tensor: tuple(value.shape) for tensor, value in original(card, known).items()}
    file = sparse_checkpoint(tmp_path / f"{name}.safetensors", shapes)
    facts = find(GenerateFlags(model=str(file), **others(tmp_path, card)), CARDS, has_cuda=False)
    assert (facts.location, facts.card, facts.shape, facts.name) == (known.id, card, known.shape, file.name)
    assert facts.files["transformer"] == PartFile(file=file, prefix=prefix)
    assert facts.sampling == known.defaults.sampling


@pytest.mark.parametrize("short", ["flux-dev", "flux2-klein-4b", "sd3.5-medium", "z-image-turbo"])
def test_tensors_are_where_diffusers_converters_find_them(tmp_path: Path, short: str) -> None:
    """Numbers are rows' own: a converter that takes others, or in another order, gives others."""
    found = CARDS.on_hub(short)
    assert found is not None
    card, known = found
    state = original(card, known)
    file = sparse_checkpoint(tmp_path / "file.safetensors", {name: tuple(each.shape) for name, each in state.items()})
    layout = layout_of(PartFile(file=file), card, known.shape)
    rows = {name: 1_000_000 * at + torch.arange(each.shape[0]) for at, (name, each) in enumerate(state.items())}
    ours = {}
    for name, pieces in layout.items():
        for piece in pieces:
            part = rows[name][piece.rows]
            ours[piece.name] = torch.cat(part.chunk(2)[::-1]) if piece.is_swapped else part
    context = {"context_embedder.weight": rows["context_embedder.weight"]} if "context_embedder.weight" in rows else {}
    theirs = MAKERS[card.transformer][1](rows | context)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def others(folder: Path, card: Card) -> dict[str, Any]:
    """Flags for the other parts, whose files need only be there."""
    files = {part: sparse_checkpoint(folder / f"{part}.safetensors", {"x": (1,)}) for part in card.weights}
    vae = {"vae": str(files["vae"])} if "vae" in card.files else {}  # else it is the base's
    return {"text_encoder": [str(files[part]) for part in card.text_encoders]} | vae


def test_a_plan_needs_no_other_file(tmp_path: Path) -> None:
    """Equal to that of the model of that name: rows of mapped tensors take no more than whole ones."""
    file = published(tmp_path, "flux-dev")
    place = Place()
    flags = GenerateFlags(model=str(file), device="cpu", res=1024, **others(tmp_path, FLUX))
    request, facts, _ = choose(flags, place, CARDS, device="cpu", gpus=())
    _, named, _ = choose(GenerateFlags(model="flux-dev", res=1024), place, CARDS, device="cpu", gpus=())
    assert (request.window, request.model) == (16, FLUX_DEV)
    ours, theirs = planned(facts), planned(named)
    assert ours is not None and theirs is not None
    assert vars(ours) | {"name": theirs.name} == vars(theirs)


@pytest.mark.parametrize(
    ("change", "given", "message"),
    [
        ({"single_blocks.0.linear1.scale_weight": ()}, {}, r"must have plain numbers, got single_blocks.0.linear1.scale"),
        ({"scaled_fp8": (2,)}, {}, r"must have plain numbers, got scaled_fp8 \(BF16\) .*nearest: the 16-bit file, with --int8"),
        ({"guidance_in.in_layer.bias": None}, {}, r"layout of a FluxTransformer2DModel or .*got .*double_blocks.0.img_attn"),
        ({"guidance_in.in_layer.bias": None}, {"base": "flux-dev"}, "lacks time_text_embed.guidance_embedder.linear_1.bias"),
        ({"img_in.weight": (3072, 384)}, {}, "a FluxTransformer2DModel of another size than .* needs --base"),
        ({"img_in.weight": (3072, 384)}, {"base": "flux-dev"}, r"\[3072, 64\], got \[3072, 384\]"),
        ({"double_blocks.3.img_attn.qkv.weight": (9217, 3072)}, {"base": "flux-dev"}, r"to_v.weight .*got \[3073, 3072\]"),
        ({}, {"base": "nothing/there/here"}, "--base must be flux-dev, .*there is no nothing/there/here"),
        ({}, {"base": "flux-schnell"}, "an unexpected tensor guidance_in.in_layer.bias and 3 more"),
        ({}, {"text_encoder": ["clip_l.safetensors"]}, "once for each of text_encoder, text_encoder_2, got 1; nearest: 2"),
        ({}, {"vae": "none.safetensors"}, "there is no file none.safetensors"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_told_by_its_header(
    tmp_path: Path, change: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    file = published(tmp_path, "flux-dev", change)
    flags = GenerateFlags(**{"model": str(file)} | others(tmp_path, FLUX) | given)
    with pytest.raises(Refusal, match=message):
        find(flags, CARDS, has_cuda=False)


def test_parts_that_are_nowhere_are_told_with_their_names_and_places(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "unet"
    folder.mkdir(parents=True)
    file = published(folder, "flux-dev")
    message = (
        rf"the text_encoder of file.safetensors must be beside it, found none of clip_l \(.safetensors\) in {folder}, "
        rf"{tmp_path}/models/text_encoders, {tmp_path}/models/clip; nearest: --text-encoder FILE, or --base "
        f"{FLUX_DEV}, which is asked for all that is missing"
    )
    with pytest.raises(Refusal, match=message):
        find(GenerateFlags(model=str(file)), CARDS, has_cuda=False)
    asked = find(GenerateFlags(model=str(file), base="flux-dev"), CARDS, has_cuda=False)
    assert asked.location == FLUX_DEV and list(asked.files) == ["transformer"]


def test_other_files_than_safetensors(tmp_path: Path) -> None:
    (tmp_path / "flux1-dev-Q8_0.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(100))
    (tmp_path / "flux1-dev.sft.pt").write_bytes(b"PK\x03\x04" + bytes(100))
    for name, message in (("flux1-dev-Q8_0.gguf", "must be safetensors, got GGUF in"), ("flux1-dev.sft.pt", "pickled")):
        with pytest.raises(Refusal, match=message):
            find(GenerateFlags(model=str(tmp_path / name)), CARDS, has_cuda=False)
    with pytest.raises(Refusal, match=r"there is no file .*; nearest: flux1-dev-Q8_0\.gguf"):
        find(GenerateFlags(model=str(tmp_path / "flux1-dev-Q80.gguf")), CARDS, has_cuda=False)
    with pytest.raises(Refusal, match="--vae is for a --model that is a safetensors file, got 'demo'"):
        find(GenerateFlags(model="demo", vae="ae.safetensors"), CARDS, has_cuda=False)


def published(folder: Path, short: str, change: Mapping[str, tuple[int, ...] | None] | None = None) -> Path:
    """A known model's file with a true header; `change` has shapes of further tensors, None: left out."""
    found = CARDS.on_hub(short)
    assert found is not None
    shapes = {name: tuple(each.shape) for name, each in original(*found).items()} | dict(change or {})
    return sparse_checkpoint(
        folder / "file.safetensors", {name: shape for name, shape in shapes.items() if shape is not None}
    )
