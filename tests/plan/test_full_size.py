"""FLUX.1-dev at its full size, on the meta device: tensors are counted that no memory here could hold."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from clear_dist.comm.group import Group
from clear_dist.engine.parts import Parts
from clear_dist.families.flux.transformer import Flux
from clear_dist.geometry import Rows, plan_text
from clear_dist.plan import TextSizes, VaeSizes, blocks, vae
from clear_dist.plan.memory import step_of
from clear_dist.plan.weights import weights_per_rank
from clear_dist.vae import decode_stripes, encode_stripes
from tests.allocated import Allocated, put_on
from tests.plan.sizes import FLUX, flux_request, numbers

GB = 1e9
HALF: dict[str, Any] = {"dtype": torch.bfloat16, "device": "meta"}


def flux(**config: Any) -> FluxTransformer2DModel:
    with torch.device("meta"):
        return FluxTransformer2DModel(guidance_embeds=True, **config).to(torch.bfloat16)


def attention_of_its_output_alone() -> Any:
    return SimpleNamespace(
        parts=Parts(),
        text_plan=plan_text(512, 1, 0),
        start_text=lambda layer, query, key, value: None,
        start_halos=lambda layer, key, value, alone=False: object(),
        attend=lambda layer, halos, query, key, value, alone=False: torch.empty_like(query),
    )


@pytest.mark.parametrize(("pixels", "images"), [(1024, 1), (2048, 2), (4096, 1), (8192, 1), (16384, 1)])
def test_activations_of_a_step(pixels: int, images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of each kind: what one holds is gone when the next one begins."""
    transformer = flux(num_layers=2, num_single_layers=2)
    tokens, text = (pixels // 16) ** 2, 512
    call = {
        "hidden_states": torch.empty(images, tokens, 64, **HALF),
        "encoder_hidden_states": torch.empty(images, text, 4096, **HALF),
        "pooled_projections": torch.empty(images, 768, **HALF),
        "timestep": torch.empty(images, **HALF),
        "guidance": torch.empty(images, device="meta"),
        "img_ids": torch.empty(tokens, 3, device="meta"),
        "txt_ids": torch.empty(text, 3, device="meta"),
    }
    family = Flux(transformer)
    put_on(family, attention_of_its_output_alone())
    with torch.no_grad(), Allocated() as allocated:
        transformer(**call)
    monkeypatch.setattr(blocks, "attention_bytes", lambda step: step.bytes_of(step.tokens))
    request = flux_request(height=pixels, width=pixels, ranks=1, cascade=False, num_images=images)
    planned = blocks.step_bytes(step_of(request, request.stages[0], request.parts[0][0]))
    assert planned.total == pytest.approx(allocated.peak, rel=0.03)


class Alone:
    """In place of a group: one rank on the meta device."""

    rank, size, device, wire = 0, 1, torch.device("meta"), torch.device("cpu")

    def settle(self) -> None:
        pass

    def all_reduce(self, tensor: torch.Tensor, _: str) -> torch.Tensor:
        return tensor


@pytest.mark.parametrize(("rows", "columns", "dtype"), [(32, 512, torch.bfloat16), (64, 64, torch.float32)])
def test_what_the_vae_holds(rows: int, columns: int, dtype: torch.dtype) -> None:
    """A stripe of 8192 px on 16 ranks, and a whole picture; attention in the middle is not for the meta device."""
    with torch.device("meta"):
        model = AutoencoderKL(**VAE | {"mid_block_add_attention": False}).to(dtype)
    request = flux_request(
        model=type(FLUX)(**{**vars_of(FLUX), "vae": VaeSizes(attention=False)}),
        height=16 * rows,
        width=16 * columns,
        ranks=1,
        cascade=False,
        dtype=str(dtype)[6:],
    )
    part, stripes = request.parts[0][0], (Rows(0, rows),)
    alone = cast(Group, Alone())
    with torch.no_grad(), Allocated() as allocated:
        decode_stripes(model, torch.empty(1, 16, 2 * rows, 2 * columns, dtype=dtype, device="meta"), alone, stripes)
    assert vae.decode_bytes(request, part) == pytest.approx(allocated.peak, rel=0.05)
    with torch.no_grad(), Allocated() as allocated:
        pixels = torch.empty(1, 3, 16 * rows, 16 * columns, dtype=dtype, device="meta")
        encode_stripes(model, pixels, alone, stripes)
    assert vae.encode_bytes(request, part) == pytest.approx(allocated.peak, rel=0.05)


def vars_of(sizes: Any) -> dict[str, Any]:
    return {name: getattr(sizes, name) for name in sizes.__dataclass_fields__}


def test_weights_of_the_transformer() -> None:
    transformer = flux()
    family = Flux(transformer)
    whole = sum(x.nbytes for x in transformer.parameters())
    modulation = sum(x.nbytes for norm in family.modulated.values() for x in norm.linear.parameters())
    layers = [transformer.get_submodule(name) for name in family.products]
    products, rows = sum(x.weight.nbytes for x in layers), sum(len(x.weight) for x in layers)
    assert weights_per_rank(FLUX, itemsize=2).held == whole
    assert weights_per_rank(FLUX, itemsize=2, hoisted=True).held == whole - modulation
    assert weights_per_rank(FLUX, itemsize=2, eight_bits=True).held == whole - products // 2 + 4 * rows
    everything = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    in_blocks = [sum(x.nbytes for x in block.parameters()) for block in everything]
    sharded = weights_per_rank(FLUX, itemsize=2, ranks=8, sharded=True)
    assert sharded.held == whole - sum(in_blocks) * 7 // 8
    assert (sharded.sent, sharded.gathered) == (sum(in_blocks) // 8, 2 * max(in_blocks))
    assert FLUX.modulation_outputs == sum(len(norm.linear.bias) for norm in family.modulated.values())


VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
"""FLUX.1's ae, as its config.json has it."""


def test_weights_of_the_other_parts() -> None:
    with torch.device("meta"):
        decoder = AutoencoderKL(**VAE)
        clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408,
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                max_position_embeddings=77,
            )
        )
        xxl = T5Config(
            vocab_size=32128,
            d_model=4096,
            d_kv=64,
            d_ff=10240,
            num_layers=24,
            num_heads=64,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
        t5 = T5EncoderModel(xxl)
    assert VaeSizes().numbers == numbers(decoder)
    assert TextSizes().numbers == numbers(clip) + numbers(t5)
    assert (TextSizes().heads, TextSizes().channels, TextSizes().hidden) == (64, 4096, 10240)
