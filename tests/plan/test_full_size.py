"""FLUX.1-dev at its full size, on the meta device: what diffusers and transformers make is what plans take it to be."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from clear_dist.comm.pretend import Pretended, Tally
from clear_dist.engine.strided import with_stride
from clear_dist.families.cards import CARDS
from clear_dist.families.flux.card import FLUX_DEV
from clear_dist.families.flux.transformer import Flux
from clear_dist.geometry import Rows
from clear_dist.plan import Engine
from clear_dist.plan.allocated import Allocated
from clear_dist.vae import MAX_BYTES, decode_stripes, encode_stripes
from tests.plan.asked import flux_request


@pytest.mark.parametrize(
    ("ranks", "encode", "stride"),
    [(2, True, 1), (4, False, 1), (4, True, 1), (16, False, 1), (4, False, 2), (2, True, 2)],
)
def test_a_tall_stripe_of_the_vae(ranks: int, encode: bool, stride: int, engine: Engine) -> None:
    """A plan asks about a few rows and goes on along straight lines; here all of a stripe of 2048 px is run."""
    side, asked = 2048 * stride, flux_request(world_size=ranks, cascade=False, token_size=16 * stride)
    vae = replace(asked.model.vae, config={**asked.model.vae.config, "stride": stride})
    asked = replace(asked, model=replace(asked.model, vae=vae, token=16 * stride)).changed(height=side, width=side)
    with torch.device("meta"):
        model = AutoencoderKL(**VAE).to(torch.bfloat16).requires_grad_(False)
    model.register_to_config(stride=stride)
    with_stride(model)
    rows = 256 // ranks
    group, stripes = Pretended.of(1, ranks, "gloo"), tuple(Rows(rows * n, rows * (n + 1)) for n in range(ranks))
    tally = Tally()
    run, shape = (encode_stripes, (1, 3, 8 * stride * rows, side)) if encode else (decode_stripes, (1, 16, rows, 256))
    with torch.no_grad(), Allocated() as allocated:
        given = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        run(model, given, group, stripes, max_bytes=MAX_BYTES["cuda"], counters=tally, by_products=True)
    planned = engine.vae(asked, asked.parts[0][1], encode=encode)
    assert planned.peak == pytest.approx(allocated.peak, rel=0.03)
    assert planned.bytes["other_bytes"] == tally.sums["other_bytes"]
    for kind in ("convolutions", "attention"):
        counted = sum(amount for (_, found), amount in allocated.operations.items() if found == kind)
        assert planned.operations[kind] == pytest.approx(counted, rel=0.001)


def test_weights_of_the_transformer(engine: Engine) -> None:
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True).to(torch.bfloat16)
    family = Flux(transformer)
    whole = sum(x.nbytes for x in transformer.parameters())
    modulation = sum(x.nbytes for norm in family.modulated.values() for x in norm.linear.parameters())
    layers = [transformer.get_submodule(name) for name in family.products]
    products, rows = sum(x.weight.nbytes for x in layers), sum(len(x.weight) for x in layers)
    plain = engine.weights(flux_request())
    assert (plain.held, plain.loading, plain.modulation, plain.blocks) == (whole, whole, modulation, 57)
    assert plain.products == products // 2
    assert plain.modulation_outputs == sum(len(norm.linear.bias) for norm in family.modulated.values())
    assert engine.weights(flux_request(hoist_modulation=True)).held == whole - modulation
    int8 = engine.weights(flux_request(int8=True))
    assert int8.held == whole - products // 2 + 4 * rows
    # A layer as it is, and in float32.
    assert int8.loading - int8.held == pytest.approx((2 + 4) * 15360 * 3072, rel=0.001)
    in_blocks = sum(x.nbytes for block in family.blocks for x in block.parameters())
    sharded = engine.weights(flux_request(shard_weights=True))
    assert (sharded.held, sharded.sent) == (whole - in_blocks * 7 // 8, in_blocks // 8)


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


def test_weights_of_the_other_parts(engine: Engine) -> None:
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
    known = CARDS.on_hub(FLUX_DEV)
    assert known is not None and known[1].text is not None
    text = known[1].text
    assert dict(known[1].configs["vae"]) == {**VAE}
    assert engine.vae(flux_request()).weights == 2 * numbers(decoder)
    assert text.numbers == numbers(clip) + numbers(t5)
    assert (text.heads, text.channels, text.hidden) == (64, 4096, 10240)


def numbers(module: torch.nn.Module) -> int:
    return sum(x.numel() for x in module.parameters())
