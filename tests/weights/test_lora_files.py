"""What a LoRA's file does to each layer, in every spelling in use, against B A alpha / rank by hand."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from clear_dist.families.cards import CARDS
from tests.tiny import make_tiny_flux, make_tiny_pipeline
from tests.tiny_lora import changes, draw, make_lora, put_on, require_equal

Tensors = dict[str, Tensor]
Modules = tuple[str, ...]
DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
ORIGINAL: dict[str, Modules] = {
    "double_blocks.0.img_attn.qkv": tuple(f"{DOUBLE}.attn.to_{x}" for x in "qkv"),
    "double_blocks.0.txt_attn.qkv": tuple(f"{DOUBLE}.attn.add_{x}_proj" for x in "qkv"),
    "double_blocks.0.img_attn.proj": (f"{DOUBLE}.attn.to_out.0",),
    "double_blocks.0.txt_attn.proj": (f"{DOUBLE}.attn.to_add_out",),
    "double_blocks.0.img_mlp.0": (f"{DOUBLE}.ff.net.0.proj",),
    "double_blocks.0.img_mlp.2": (f"{DOUBLE}.ff.net.2",),
    "double_blocks.0.txt_mlp.0": (f"{DOUBLE}.ff_context.net.0.proj",),
    "double_blocks.0.txt_mlp.2": (f"{DOUBLE}.ff_context.net.2",),
    "double_blocks.0.img_mod.lin": (f"{DOUBLE}.norm1.linear",),
    "double_blocks.0.txt_mod.lin": (f"{DOUBLE}.norm1_context.linear",),
    "single_blocks.0.linear1": (*(f"{SINGLE}.attn.to_{x}" for x in "qkv"), f"{SINGLE}.proj_mlp"),
    "single_blocks.0.linear2": (f"{SINGLE}.proj_out",),
    "single_blocks.0.modulation.lin": (f"{SINGLE}.norm.linear",),
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
"""Black Forest Labs' names, and diffusers' for the same layers."""
XLABS: dict[str, Modules] = {
    "double_blocks.0.processor.qkv_lora1": ORIGINAL["double_blocks.0.img_attn.qkv"],
    "double_blocks.0.processor.qkv_lora2": ORIGINAL["double_blocks.0.txt_attn.qkv"],
    "double_blocks.0.processor.proj_lora1": ORIGINAL["double_blocks.0.img_attn.proj"],
    "double_blocks.0.processor.proj_lora2": ORIGINAL["double_blocks.0.txt_attn.proj"],
    "single_blocks.0.processor.qkv_lora": tuple(f"{SINGLE}.attn.to_{x}" for x in "qkv"),
    "single_blocks.0.processor.proj_lora": (f"{SINGLE}.proj_out",),
}
OWN: dict[str, Modules] = {module: (module,) for modules in ORIGINAL.values() for module in modules}
AB, ADAPTER = ((f"lora_A.{name}weight", f"lora_B.{name}weight") for name in ("", "style-1."))
DOWN, BARE = ((f"{name}down.weight", f"{name}up.weight") for name in ("lora_", ""))
CLIP, T5 = "encoder.layers.0.self_attn.q_proj", "encoder.block.0.layer.1.DenseReluDense.wi_0"


def flat(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name.replace(".", "_")


def dotted(prefix: str = "") -> Callable[[str], str]:
    return lambda name: prefix + name


SPELLINGS: dict[str, tuple[Mapping[str, Modules], Callable[[str], str], tuple[str, str], bool]] = {
    "diffusers": (OWN, dotted("transformer."), AB, False),
    "diffusers, with alpha": (OWN, dotted("transformer."), AB, True),
    "diffusers, older": (OWN, dotted("transformer."), ("lora.down.weight", "lora.up.weight"), False),
    "no prefix": (OWN, dotted(), AB, False),
    "peft": (OWN, dotted("base_model.model."), AB, False),
    "peft's adapter name": (OWN, dotted("transformer."), ADAPTER, False),
    "OneTrainer": (OWN, flat("lora_transformer_"), DOWN, True),
    "kohya, diffusers' layers": (OWN, flat("lora_unet_"), DOWN, True),
    "kohya": (ORIGINAL, flat("lora_unet_"), DOWN, True),
    "BFL": (ORIGINAL, dotted(), AB, False),
    "ComfyUI": (ORIGINAL, dotted("diffusion_model."), DOWN, True),
    "ComfyUI, A and B": (ORIGINAL, dotted("diffusion_model."), AB, False),
    "fal": (ORIGINAL, dotted("base_model.model."), AB, False),
    "BFL after transformer.": (ORIGINAL, dotted("transformer."), AB, False),
    "flattened after transformer.": (OWN, flat("transformer."), AB, False),
    "XLabs": (XLABS, dotted(), BARE, False),
}
"""Layers, their names in the file, names of the halves, and whether there are alphas."""
TEXT_SPELLINGS: dict[str, tuple[str, str]] = {
    "CLIP, diffusers": (f"text_encoder.text_model.{CLIP}", "text_encoder"),
    "CLIP, diffusers 0.40": (f"text_encoder.{CLIP}", "text_encoder"),
    "CLIP, kohya": (f"lora_te1_text_model_{CLIP.replace('.', '_')}", "text_encoder"),
    "CLIP, one encoder": (f"lora_te_text_model_{CLIP.replace('.', '_')}", "text_encoder"),
    "CLIP, ComfyUI": (f"text_encoders.clip_l.transformer.text_model.{CLIP}", "text_encoder"),
    "T5, diffusers": (f"text_encoder_2.{T5}", "text_encoder_2"),
    "T5, OneTrainer": (f"lora_te2_{T5.replace('.', '_')}", "text_encoder_2"),
    "T5, kohya": (f"lora_te3_{T5.replace('.', '_')}", "text_encoder_2"),
    "T5, ComfyUI": (f"text_encoders.t5xxl.transformer.{T5}", "text_encoder_2"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_flux(tmp_path_factory.mktemp("model"))


@pytest.fixture
def pipe(model: Path) -> FluxPipeline:
    return FluxPipeline.from_pretrained(model)


def split(modules: Modules, pipe: FluxPipeline, change: Tensor) -> Tensors:
    """Cut by the modules' outputs; the two halves of the last modulation are in the other order in diffusers."""
    if modules == ("norm_out.linear",):
        return {modules[0]: torch.cat(change.chunk(2)[::-1])}
    sizes = [pipe.transformer.get_submodule(module).out_features for module in modules]
    return dict(zip(modules, change.split(sizes), strict=True))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_each_spelling_lands(model: Path, pipe: FluxPipeline, tmp_path: Path, spelling: str) -> None:
    layers, named, halves, has_alpha = SPELLINGS[spelling]
    tensors, expected = {}, {}
    torch.manual_seed(1)
    for number, (name, modules) in enumerate(layers.items()):
        linear = [pipe.transformer.get_submodule(module) for module in modules]
        rank = 2 + number % 3
        down, up = draw(rank, linear[0].in_features), draw(sum(layer.out_features for layer in linear), rank)
        tensors |= {f"{named(name)}.{halves[0]}": down, f"{named(name)}.{halves[1]}": up}
        if has_alpha:
            tensors[f"{named(name)}.alpha"] = torch.tensor(1.5)
        change = 0.5 * (1.5 / rank if has_alpha else 1) * up @ down
        expected |= {modules[0]: change} if layers is OWN else split(modules, pipe, change)
    put_on(pipe, model, tensors, tmp_path / "style.safetensors", 0.5)
    require_equal(changes(pipe.transformer), expected)


@pytest.mark.parametrize("spelling", TEXT_SPELLINGS)
def test_each_spelling_of_text_encoders_lands(model: Path, pipe: FluxPipeline, tmp_path: Path, spelling: str) -> None:
    name, part = TEXT_SPELLINGS[spelling]
    encoder = getattr(pipe, part)
    (module,) = (each for each, _ in encoder.named_modules() if each.endswith((CLIP, T5)))
    layer = encoder.get_submodule(module)
    down, up = draw(2, layer.in_features), draw(layer.out_features, 2)
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(3.0)}
    put_on(pipe, model, tensors, tmp_path / "style.safetensors", -0.5)
    require_equal(changes(encoder), {module: -0.75 * up @ down})
    others = {"transformer", "text_encoder", "text_encoder_2"} - {part}
    assert not any(changes(getattr(pipe, other)) for other in others)


def test_parts_that_are_not_here_are_passed_over(model: Path, pipe: FluxPipeline, tmp_path: Path) -> None:
    """Only rank 0 has text encoders, and while it has them no transformer."""
    tensors = make_lora(pipe.transformer, seed=1) | make_lora(pipe.text_encoder, seed=2, prefix="text_encoder")
    torch.manual_seed(3)
    down, up = draw(2, pipe.text_encoder_2.config.d_model), draw(pipe.text_encoder_2.config.d_ff, 2)
    tensors |= {f"lora_te3_{T5.replace('.', '_')}.lora_{way}.weight": x for way, x in (("down", down), ("up", up))}
    encoder, transformer = pipe.text_encoder_2, pipe.transformer
    pipe.text_encoder = pipe.text_encoder_2 = None
    put_on(pipe, model, tensors, tmp_path / "style.safetensors")
    assert len(changes(transformer)) == sum(".lora_A." in name for name in tensors if name.startswith("transformer."))
    pipe.transformer, pipe.text_encoder_2 = None, encoder
    put_on(pipe, model, tensors, tmp_path / "style.safetensors")
    require_equal(changes(encoder), {T5: up @ down})


@pytest.mark.parametrize("kind", ["lora_magnitude_vector", "lora_magnitude_vector.default", "dora_scale"])
def test_dora(model: Path, pipe: FluxPipeline, tmp_path: Path, kind: str) -> None:
    """Rows of W + B A are given the lengths in the file; those of fused layers are their parts'."""
    names = ("double_blocks.0.img_attn.qkv", "final_layer.adaLN_modulation.1")
    tensors, expected = {}, {}
    torch.manual_seed(4)
    for name in names:
        weights = torch.cat([pipe.transformer.get_submodule(module).weight for module in ORIGINAL[name]])
        if name == names[1]:
            weights = torch.cat(weights.chunk(2)[::-1])
        down, up, lengths = draw(2, 32), draw(len(weights), 2), 1 + torch.rand(len(weights))
        halves = {"lora_A.weight": down, "lora_B.weight": up, "alpha": torch.tensor(1.0)}
        magnitude = {kind: lengths[:, None] if kind == "dora_scale" else lengths}
        tensors |= {f"diffusion_model.{name}.{key}": x for key, x in (halves | magnitude).items()}
        changed = weights + 0.5 * up @ down
        changed = lengths[:, None] * changed / changed.norm(dim=1, keepdim=True)
        expected |= split(ORIGINAL[name], pipe, changed - weights)
    put_on(pipe, model, tensors, tmp_path / "style.safetensors")
    require_equal(changes(pipe.transformer), expected)


def test_the_table_names_no_layer_that_the_model_has_not() -> None:
    """FLUX.1-schnell has no guidance."""
    for guidance in (True, False):
        transformer = make_tiny_pipeline(guidance_embeds=guidance).transformer
        card = CARDS.of_transformer(type(transformer).__name__)
        assert card is not None
        layers = card.shape_of(transformer.config, "config.json").lora_layers()
        linear = {name: layer for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear)}
        assert {module for layer in layers.values() for module in layer.modules} == linear.keys()
        for layer in layers.values():
            sizes = [(linear[module].out_features, linear[module].in_features) for module in layer.modules]
            assert sizes == [(outputs, layer.inputs) for outputs in layer.modules.values()]
