"""The card against diffusers' own model, and names of layers against diffusers' own conversion."""

from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

from clear_dist.families.cards import CARDS
from clear_dist.families.sd3.card import CARD, SD3Shape
from clear_dist.families.sd3.names import original_layers
from clear_dist.launch.env import Place
from clear_dist.options import Refusal
from clear_dist.request.flags import GenerateFlags
from clear_dist.request.settle import settle
from tests.families.sd3.tiny import KINDS, Kind, make_tiny_transformer

BILLIONS = {"sd3.5-large": 8.06, "sd3.5-large-turbo": 8.06, "sd3.5-medium": 2.24, "sd3-medium": 2.03}
"""Numbers in the weights, as published; tables of positions are none of them."""


@pytest.mark.parametrize("known", CARD.hub_models, ids=lambda known: known.short)
def test_the_models_of_the_hub_have_diffusers_tensors(known: Any) -> None:
    with torch.device("meta"), init_empty_weights():
        model = SD3Transformer2DModel(**known.configs["transformer"])
    expected = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    assert known.shape.tensors() == expected
    assert sum(x.numel() for x in model.parameters()) / 1e9 == pytest.approx(BILLIONS[known.short], abs=0.06)
    attention = {name for name, module in model.named_modules() if hasattr(module, "get_processor")}
    assert {name.rpartition(".attn")[0] for name in known.shape.clear_tensors()} == {
        name.rpartition(".attn")[0] for name in attention
    }
    pooled = [name for name in known.shape.clear_tensors(4) if name.endswith("spatial_weight")]
    assert len(pooled) == known.shape.num_layers
    assert len(known.shape.clear_tensors()) == 8 * len(attention)


@pytest.mark.parametrize("kind", KINDS)
def test_original_names_are_diffusers_own(kind: Kind) -> None:
    """A checkpoint by the original names, converted by diffusers, has each layer's parts where the card says."""
    model = make_tiny_transformer(kind)
    shape = SD3Shape.of(model.config, "here")
    own = model.state_dict()
    checkpoint = {"pos_embed": own["pos_embed.pos_embed"], "context_embedder.weight": own["context_embedder.weight"]}
    checkpoint |= {"context_embedder.bias": own["context_embedder.bias"]}
    checkpoint |= {f"x_embedder.proj.{name}": own[f"pos_embed.proj.{name}"] for name in ("weight", "bias")}
    layers = {name.removesuffix(".weight") for name, x in own.items() if name.endswith("weight") and x.ndim == 2}
    originals, generator = dict(original_layers(layers)), torch.Generator().manual_seed(7)
    for original, modules in originals.items():
        for name in ("weight", "bias"):
            like = torch.cat([own[f"{module}.{name}"] for module in modules])
            checkpoint[f"{original}.{name}"] = torch.randn(like.shape, generator=generator)
    for index in range(shape.num_layers) if shape.norms_heads else ():
        for norm in ("x_block.attn.ln_q", "x_block.attn.ln_k", "context_block.attn.ln_q", "context_block.attn.ln_k"):
            checkpoint[f"joint_blocks.{index}.{norm}.weight"] = torch.ones(shape.attention_head_dim)
        for norm in ("ln_q", "ln_k") if index in shape.dual_attention_layers else ():
            checkpoint[f"joint_blocks.{index}.x_block.attn2.{norm}.weight"] = torch.ones(shape.attention_head_dim)
    converted = convert_sd3_transformer_checkpoint_to_diffusers(dict(checkpoint))
    assert converted.keys() == own.keys()
    adapted = shape.lora_layers()
    for original, modules in originals.items():
        layer = adapted[original.replace(".", "_")]
        assert layer.modules == {module: len(own[f"{module}.weight"]) for module in modules}
        found = torch.cat([converted[f"{module}.weight"] for module in modules])
        expected = checkpoint[f"{original}.weight"]
        if layer.is_swapped:
            expected = torch.cat(expected.chunk(2)[::-1])
        assert torch.equal(found, expected), original
    assert {module.replace(".", "_") for module in layers} <= adapted.keys()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"qk_norm": "layer_norm"}, "qk_norm must be null or rms_norm, got 'layer_norm' in here; nearest: rms_norm"),
        ({"caption_projection_dim": 64}, "caption_projection_dim must be 1152, got 64 in here"),
        ({"patch_size": 4}, "patch_size must be 2, got 4 in here"),
        ({"num_layers": 0}, "num_layers must be a whole number from 1 to 65536, got 0 in here"),
        ({"dual_attention_layers": [1, "two"]}, "dual_attention_layers must be a list of blocks, got"),
        ({"dual_attention_layers": 3}, "dual_attention_layers must be a list of blocks, got 3 in here"),
    ],
)
def test_wrong_configurations_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(Refusal, match=message):
        SD3Shape.of(config, "here")


def test_guidance_is_by_the_model() -> None:
    chosen = {known.short: known.defaults for _, known in map(CARDS.on_hub, BILLIONS)}  # type: ignore[misc]
    found = {name: (each.sampling.steps, each.sampling.true_cfg_scale) for name, each in chosen.items()}
    assert found == {
        "sd3.5-large": (28, 3.5),
        "sd3.5-large-turbo": (4, 1.0),
        "sd3.5-medium": (40, 4.5),
        "sd3-medium": (28, 7.0),
    }
    assert {(each.negative_prompt, each.takes_guidance) for each in chosen.values()} == {("", False)}


def test_flags_of_other_families_are_told_of() -> None:
    flags = GenerateFlags(model="sd3.5-large", device="cpu", guidance_scale=4.0, ntk_factor=3.0, res=3072)
    lines = settle(flags, Place(), CARDS)[2]
    told = [line for line in lines if line.startswith("warning: --")]
    assert told == [
        "warning: --guidance-scale has no effect: this model was not distilled with guidance; nearest: --true-cfg-scale",
        "warning: --ntk-factor has no effect: this model has no rotary positions",
    ]
    larger = settle(GenerateFlags(model="sd3.5-large", device="cpu", res=3088), Place(), CARDS)[2]
    assert [line for line in larger if "positions" in line] == [
        "warning: 3088 px is beyond the model's 3072 px of positions: they are interpolated, which is untried"
    ]
    assert not any("positions:" in line for line in lines)
    assert f"window: full ({CARD.hub_models[0].id} without CLEAR weights; clear-dist distill makes some)" in lines
