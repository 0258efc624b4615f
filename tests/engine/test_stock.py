"""What people do to a pipeline that is on stripes: each is refused in a line of ours that says what to do."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    ContextParallelConfig,
    FirstBlockCacheConfig,
    FluxPipeline,
    FluxTransformer2DModel,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
)
from diffusers.hooks import apply_first_block_cache, apply_mag_cache, apply_pyramid_attention_broadcast

import clear_dist
from clear_dist.families.flux.transformer import Flux
from clear_dist.parallelize import parallelize
from tests.oracle import DenseClearProcessor
from tests.test_parallelize import HEIGHT, WIDTH, oracle_latents, relative_error, run
from tests.tiny import make_tiny_pipeline

COMPILED = r"torch\.compile cannot follow messages between ranks; pass parallelize\(compile=True\)"
CACHED = "step caches must be off"
COPIED = r"cannot be copied or pickled.*call undo\(\) first"


def compiled_for_our_own_loop(pipe: FluxPipeline) -> None:
    pipe.transformer = torch.compile(pipe.transformer)
    clear_dist.generate(pipe, "a hill", height=16 * HEIGHT, width=16 * WIDTH, num_inference_steps=1)


def first_block_cache(pipe: FluxPipeline) -> None:
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))


def broadcast(pipe: FluxPipeline) -> None:
    """Uses a function of diffusers that tells the model nothing."""
    skipping = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: 500,
    )
    apply_pyramid_attention_broadcast(pipe.transformer, skipping)


def own_processor(pipe: FluxPipeline) -> None:
    pipe.transformer.transformer_blocks[0].attn.set_processor(DenseClearProcessor(HEIGHT, WIDTH, 4))


def train(pipe: FluxPipeline) -> None:
    inputs = Flux(pipe.transformer).empty_inputs((HEIGHT, WIDTH), images=1, text_tokens=9)
    pipe.transformer.requires_grad_(True)(**{name: torch.zeros_like(x) for name, x in inputs.items()})


REFUSED: dict[str, tuple[Callable[[FluxPipeline], Any], str]] = {
    "compiled, generate": (compiled_for_our_own_loop, COMPILED),
    "repeated blocks compiled": (lambda pipe: pipe.transformer.compile_repeated_blocks(), COMPILED),
    "first-block cache": (first_block_cache, CACHED),
    "mag cache": (
        lambda pipe: pipe.transformer.enable_cache(MagCacheConfig(num_inference_steps=3, mag_ratios=torch.ones(3))),
        CACHED,
    ),
    "broadcast": (broadcast, CACHED),
    "first-block cache by its function": (
        lambda pipe: apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=0.1)),
        CACHED,
    ),
    "mag cache by its function": (
        lambda pipe: apply_mag_cache(pipe.transformer, MagCacheConfig(num_inference_steps=3, mag_ratios=torch.ones(3))),
        CACHED,
    ),
    "diffusers' parallelism": (
        lambda pipe: pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2)),
        "enable_parallelism cannot be combined with parallelize",
    ),
    "projections fused": (lambda pipe: pipe.transformer.fuse_qkv_projections(), "leave out fuse_qkv_projections"),
    "deep copy": (copy.deepcopy, COPIED),
    "pickled": (lambda pipe: pickle.dumps(pipe.transformer), COPIED),
    "a processor of one's own": (own_processor, "got DenseClearProcessor; processors of one's own cannot be combined"),
    "training": (train, r"draw and do not train: call the model under torch\.no_grad\(\), or undo\(\)"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_follow_stripes_is_refused_by_us(what: str) -> None:
    do, why = REFUSED[what]
    pipe = make_tiny_pipeline()
    handle = parallelize(pipe, window=4)
    with pytest.raises(ValueError, match=why) as caught:
        (do(pipe), run(pipe))
    assert "\n" not in str(caught.value)
    handle.undo()


def test_a_compiler_that_wants_one_graph_gives_our_reason() -> None:
    pipe = make_tiny_pipeline()
    handle = parallelize(pipe, window=4)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=COMPILED):  # a class of torch's insides
        run(pipe)
    handle.undo()


def test_a_cache_of_before_is_refused_until_it_is_off() -> None:
    for cache in (broadcast, first_block_cache):
        pipe = make_tiny_pipeline()
        cache(pipe)
        with pytest.raises(ValueError, match=CACHED):
            parallelize(pipe, window=4)
    pipe.transformer.disable_cache()
    parallelize(pipe, window=4, text_attention="exact")
    assert relative_error(run(pipe), oracle_latents(4, None)) < 1e-4


def test_undo_gives_everything_back(tmp_path: Any) -> None:
    pipe = make_tiny_pipeline()
    handle = parallelize(pipe, window=4)
    pipe.save_pretrained(tmp_path)
    handle.undo()
    assert type(pipe.transformer) is FluxTransformer2DModel
    again = FluxPipeline.from_pretrained(tmp_path)
    for other in (again, copy.deepcopy(pipe)):
        assert relative_error(run(other), run(pipe)) < 1e-5
    first_block_cache(pipe)
    pipe.transformer.fuse_qkv_projections()
