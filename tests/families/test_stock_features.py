"""diffusers' own pipelines and their arguments: 3 ranks against one, against an oracle, and against those pipelines."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import (
    FluxControlImg2ImgPipeline,
    FluxControlInpaintPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import Tensor

from clear_dist.comm.group import Group
from clear_dist.parallelize import parallelize
from tests.oracle import DenseClearProcessor
from tests.ranks import run_ranks
from tests.test_parallelize import HEIGHT, WIDTH, relative_error
from tests.tiny import CLIP_WIDTH, T5_WIDTH, draw_weights, make_tiny_pipeline
from tests.tiny_controlnet import picture

RADIUS = 4
PICTURE, CONTROL = picture(HEIGHT, WIDTH, 1), picture(HEIGHT, WIDTH, 2)
MASK = torch.zeros(1, 1, 16 * HEIGHT, 16 * WIDTH).index_fill(2, torch.arange(60, 140), 1.0)
REFINED = {"image": PICTURE, "strength": 0.7, "num_inference_steps": 4}


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9))


def upside_down(pipe: Any, step: int, _: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Another picture, and after the second step another prompt of another length."""
    changed = {"latents": tensors["latents"].flip(1)}
    return changed | ({"prompt_embeds": tensors["prompt_embeds"].flip(1)} if step else {})


def with_channels(count: int) -> FluxTransformer2DModel:
    """Takes a condition beside the latents' 64 channels."""
    config = {name: value for name, value in make_tiny_pipeline().transformer.config.items() if name[0] != "_"}
    transformer = FluxTransformer2DModel(**{**config, "in_channels": count, "out_channels": 64})
    return draw_weights(transformer, torch.Generator().manual_seed(3))


@cache
def parts_of(channels: int) -> dict[str, Any]:
    return make_tiny_pipeline().components | ({} if channels == 64 else {"transformer": with_channels(channels)})


def of_kind(kind: Any, *, channels: int = 64, bare: bool = False) -> Callable[[], Any]:
    """A maker of tiny pipelines, which share their parts.

    Args:
        bare: its class takes no image encoder.
    """

    def make() -> Any:
        without = ("image_encoder", "feature_extractor") if bare else ()
        return kind(**{name: part for name, part in parts_of(channels).items() if name not in without})

    return make


TEXT = of_kind(FluxPipeline)
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "guidance": (TEXT, {"guidance_scale": 7.0}),
    "negative prompt": (TEXT, {"negative_prompt": "fog", "true_cfg_scale": 2.0}),
    "batch, a generator each": (
        TEXT,
        {"prompt": ["a hill", "the sea"], "generator": [torch.Generator().manual_seed(seed) for seed in (3, 4)]},
    ),
    "pictures per prompt": (TEXT, {"prompt": ["a hill", "the sea"], "num_images_per_prompt": 2}),
    "two prompts": (TEXT, {"prompt_2": "fog", "negative_prompt": "x", "negative_prompt_2": "y", "true_cfg_scale": 1.5}),
    "embeddings": (
        TEXT,
        {
            "prompt": None,
            "prompt_embeds": drawn(1, 11, T5_WIDTH),
            "pooled_prompt_embeds": drawn(1, CLIP_WIDTH),
            "latents": drawn(1, HEIGHT * WIDTH, 64),
            "sigmas": [1.0, 0.6, 0.3],
        },
    ),
    "callback": (
        TEXT,
        {
            "callback_on_step_end": upside_down,
            "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
        },
    ),
    "image-to-image": (of_kind(FluxImg2ImgPipeline), {**REFINED, "negative_prompt": "fog", "true_cfg_scale": 2.0}),
    "inpainting": (of_kind(FluxInpaintPipeline), {**REFINED, "mask_image": MASK}),
    "fill": (of_kind(FluxFillPipeline, channels=384, bare=True), {"image": PICTURE, "mask_image": MASK}),
    "control": (of_kind(FluxControlPipeline, channels=128, bare=True), {"control_image": CONTROL}),
    "control, image-to-image": (
        of_kind(FluxControlImg2ImgPipeline, channels=128, bare=True),
        {**REFINED, "control_image": CONTROL},
    ),
    "control, inpainting": (
        of_kind(FluxControlInpaintPipeline, channels=128, bare=True),
        {**REFINED, "mask_image": MASK, "control_image": CONTROL},
    ),
    "Kontext without a picture": (of_kind(FluxKontextPipeline), {"max_area": 256 * HEIGHT * WIDTH}),
}
REFERENCE = {"image": PICTURE, "_auto_resize": False, "max_area": 256 * HEIGHT * WIDTH}
WITH_REFERENCES = {
    "Kontext": (of_kind(FluxKontextPipeline), REFERENCE),
    "Kontext, inpainting": (of_kind(FluxKontextInpaintPipeline), {**REFERENCE, "mask_image": MASK}),
}
"""Their windows are compared in `flux2/test_references.py`: the oracle here has no place for references."""


def draw(pipe: Any, **arguments: Any) -> Tensor:
    """Latents after the last step; generators are as if never used before."""
    pipe.set_progress_bar_config(disable=True)
    generators = arguments.pop("generator", torch.Generator().manual_seed(7))
    for generator in generators if isinstance(generators, list) else [generators]:
        generator.manual_seed(generator.initial_seed())
    settings = {"prompt": "a lighthouse at dusk", "num_inference_steps": 3, "max_sequence_length": 9} | arguments
    size = {"height": 16 * HEIGHT, "width": 16 * WIDTH, "output_type": "latent"}
    return pipe(**settings, **size, generator=generators).images


def striped_latents(group: Group, settings: dict[str, Any]) -> dict[str, Tensor]:
    results, cases = {}, CASES if settings["window"] == RADIUS else CASES | WITH_REFERENCES
    for name, (make, arguments) in cases.items():
        pipe = make()
        handle = parallelize(pipe, group=group, **settings)
        results[name] = draw(pipe, **arguments)
        assert handle.grid == (HEIGHT, WIDTH)
        handle.undo()
    return results


@cache
def expected(name: str, radius: int | None) -> Tensor:
    """The unmodified pipeline; a radius: with a dense processor in place of full attention."""
    make, arguments = (CASES | WITH_REFERENCES)[name]
    pipe = make()
    stock = dict(pipe.transformer.attn_processors)
    if radius is not None:
        pipe.transformer.set_attn_processor(DenseClearProcessor(HEIGHT, WIDTH, radius))
    latents = draw(pipe, **arguments)
    pipe.transformer.set_attn_processor(stock)
    return latents


@pytest.mark.parametrize("size", [1, 3])
def test_a_window(size: int) -> None:
    for results in run_ranks(striped_latents, size, {"window": RADIUS, "text_attention": "exact"}):
        for name, latents in results.items():
            assert relative_error(latents, expected(name, RADIUS)) < 1e-4, name
            assert relative_error(latents, expected(name, None)) > 1e-2, name


@pytest.mark.parametrize("size", [1, 3])
def test_full_attention_is_the_stock_pipeline(size: int) -> None:
    for results in run_ranks(striped_latents, size, {"window": "full"}):
        for name, latents in results.items():
            assert relative_error(latents, expected(name, None)) < 1e-4, name


def test_each_argument_matters() -> None:
    """Else nobody would see it lost."""
    texts = [name for name, (make, _) in CASES.items() if make is TEXT]
    plain = draw(TEXT())
    assert all(len(expected(name, None)) > 1 or relative_error(expected(name, None), plain) > 1e-3 for name in texts)


def ip_adapter() -> dict[str, dict[str, Tensor]]:
    """For the tiny FLUX, of one double block."""
    width = 32
    kinds = {"to_k_ip": width, "to_v_ip": width}
    layers = {f"0.{kind}.weight": drawn(out, T5_WIDTH) for kind, out in kinds.items()}
    layers |= {f"0.{kind}.bias": drawn(out) for kind, out in kinds.items()}
    projection = {"proj.weight": drawn(4 * T5_WIDTH, 8), "proj.bias": drawn(4 * T5_WIDTH)}
    norm = {"norm.weight": torch.ones(T5_WIDTH), "norm.bias": torch.zeros(T5_WIDTH)}
    return {"image_proj": projection | norm, "ip_adapter": layers}


def load_ip_adapter(pipe: FluxPipeline) -> None:
    pipe.load_ip_adapter(ip_adapter(), weight_name="none", image_encoder_pretrained_model_name_or_path=None)


def test_ip_adapters_are_refused_before_and_after() -> None:
    embeds = {"ip_adapter_image_embeds": [drawn(1, 1, 8)], "negative_ip_adapter_image_embeds": [drawn(1, 1, 8)]}
    pipe = make_tiny_pipeline()
    stock = draw(pipe)
    load_ip_adapter(pipe)
    assert relative_error(draw(pipe, **embeds), stock) > 1e-2
    with pytest.raises(ValueError, match=r"must be FluxAttnProcessor, got FluxIPAdapterAttnProcessor; IP-Adapters"):
        parallelize(pipe, window="full")
    assert relative_error(draw(pipe, **embeds), stock) > 1e-2
    pipe.unload_ip_adapter()
    handle = parallelize(pipe, window="full")
    with pytest.raises(ValueError, match=r"IP-Adapters cannot be combined with clear_dist\.parallelize; undo\(\)"):
        load_ip_adapter(pipe)
    assert relative_error(draw(pipe), stock) < 1e-4
    handle.undo()


def test_fused_projections_are_refused_before_and_after() -> None:
    pipe = make_tiny_pipeline()
    stock = draw(pipe)
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"fused projections cannot be cut; call pipe\.transformer\.unfuse"):
        parallelize(pipe, window="full")
    pipe.transformer.unfuse_qkv_projections()
    handle = parallelize(pipe, window="full")
    with pytest.raises(ValueError, match="fused projections cannot be cut"):
        pipe.transformer.fuse_qkv_projections()
    for layer in (pipe.transformer.transformer_blocks[0].attn, pipe.transformer.single_transformer_blocks[0].attn):
        layer.fuse_projections()
        with pytest.raises(ValueError, match=r"fused projections cannot be cut; call pipe\.transformer\.unfuse"):
            draw(pipe)
    pipe.transformer.unfuse_qkv_projections()
    assert relative_error(draw(pipe), stock) < 1e-4
    handle.undo()


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_weights_stored_in_fewer_bits_are_those_of_the_stock_pipeline(before: bool) -> None:
    """Layerwise casting: bfloat16 in memory, float32 for products."""
    stock, pipe = make_tiny_pipeline(), make_tiny_pipeline()
    casting = {"storage_dtype": torch.bfloat16, "compute_dtype": torch.float32}
    stock.transformer.enable_layerwise_casting(**casting)
    if before:
        pipe.transformer.enable_layerwise_casting(**casting)
    parallelize(pipe, window="full")
    if not before:
        pipe.transformer.enable_layerwise_casting(**casting)
    assert relative_error(draw(pipe), draw(stock)) < 1e-4
    assert relative_error(draw(pipe), draw(make_tiny_pipeline())) > 1e-3


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_weights_brought_group_by_group_are_those_of_the_stock_pipeline(before: bool, level: str) -> None:
    pipe = make_tiny_pipeline(double_blocks=2, single_blocks=2)
    stock = draw(make_tiny_pipeline(double_blocks=2, single_blocks=2))
    offload = {"onload_device": torch.device("cpu"), "offload_type": level, "num_blocks_per_group": 1}
    if before:
        pipe.transformer.enable_group_offload(**offload)
    handle = parallelize(pipe, window="full")
    if not before:
        pipe.transformer.enable_group_offload(**offload)
    assert relative_error(draw(pipe), stock) < 1e-4
    handle.undo()
    assert torch.equal(draw(pipe), stock)


def whole(pipe: FluxPipeline) -> None:
    pipe.transformer.compile(backend="eager")


def one_block(pipe: FluxPipeline) -> None:
    pipe.transformer.single_transformer_blocks[0].compile(backend="eager")


def wrapped(pipe: FluxPipeline) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


@pytest.mark.parametrize("how", [whole, one_block, wrapped])
def test_torch_compile_is_refused_before_and_after(how: Callable[[FluxPipeline], None]) -> None:
    refusal = r"torch\.compile cannot follow messages between ranks; pass parallelize\(compile=True\)"
    pipe = make_tiny_pipeline()
    how(pipe)
    with pytest.raises(ValueError, match=refusal):
        parallelize(pipe, window=RADIUS)
    pipe = make_tiny_pipeline()
    handle = parallelize(pipe, window=RADIUS)
    with pytest.raises(ValueError, match=refusal):
        (how(pipe), draw(pipe))
    handle.undo()
