"""Blocks on stripes compute what diffusers' do, in chunks too, and leave nothing behind."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from clear_dist.comm.group import Group
from clear_dist.engine import parts
from clear_dist.engine.parts import Parts, joined
from clear_dist.families.flux.blocks import StripedDoubleBlock, StripedSingleBlock
from clear_dist.families.flux.transformer import Flux
from clear_dist.geometry import plan_text
from clear_dist.parallelize import parallelize
from clear_dist.plan.allocated import Allocated
from tests.put_on import put_on
from tests.ranks import run_ranks
from tests.test_parallelize import oracle_latents, relative_error, run
from tests.tiny import make_tiny_pipeline
from tests.weights.test_hoisted import inputs

EXACT: dict[str, Any] = {"window": 4, "text_attention": "exact"}
GB = 1e9


def blocks_of(pipe: FluxPipeline) -> list[nn.Module]:
    return [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]


def drawn(group: Group, most_tokens: int, settings: dict[str, Any]) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "MOST_TOKENS", most_tokens)
        pipe = make_tiny_pipeline(double_blocks=2, single_blocks=2)
        handle = parallelize(pipe, group=group, **settings)
        latents = run(pipe, prompt=["a hill", "the sea"])
        handle.undo()
    return latents


@pytest.mark.parametrize("settings", [EXACT, {"window": "full"}, EXACT | {"schedule": "stale", "warmup_steps": 1}])
@pytest.mark.parametrize("size", [1, 3])
def test_chunks_change_no_more_than_the_last_bits(size: int, settings: dict[str, Any]) -> None:
    """Products of fewer rows may add up in another order. Two pictures of some 150 tokens, 9 of them text."""
    whole = run_ranks(drawn, size, parts.MOST_TOKENS, settings)[0]
    for most_tokens in (100, 7):
        for latents in run_ranks(drawn, size, most_tokens, settings):
            assert relative_error(latents, whole) < 1e-6


@pytest.mark.parametrize("size", [1, 2])
def test_chunks_against_the_oracle(size: int) -> None:
    for latents in run_ranks(drawn_once, size):
        assert relative_error(latents, oracle_latents(4, None)) < 1e-4


def drawn_once(group: Group) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "MOST_TOKENS", 20)
        pipe = make_tiny_pipeline()
        parallelize(pipe, group=group, **EXACT)
        return run(pipe)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_compute_what_diffusers_blocks_do(dtype: torch.dtype) -> None:
    """To the bit by the same products. Hooks that were on a block before hold diffusers' forward with the processor."""
    ours, theirs = (make_tiny_pipeline(double_blocks=2, single_blocks=2).to(dtype) for _ in range(2))
    for block in blocks_of(theirs):
        add_hook_to_module(block, ModelHook())
    handles = [parallelize(pipe, **EXACT) for pipe in (ours, theirs)]
    try:
        with torch.backends.mkldnn.flags(enabled=dtype != torch.float32):
            assert torch.equal(run(ours), run(theirs))
        assert relative_error(run(ours), run(theirs)) < 1e-6
    finally:
        for handle in handles:
            handle.undo()


class InPlace(nn.Module):
    """An embedder that writes to one tensor."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.stock = stock
        self.written: Tensor | None = None

    def forward(self, *inputs: Tensor) -> Tensor:
        embedding = self.stock(*inputs)
        self.written = embedding if self.written is None else self.written.copy_(embedding)
        return self.written


def test_an_embedding_may_be_the_last_steps_tensor() -> None:
    pipe = make_tiny_pipeline()
    handle = parallelize(pipe, **EXACT)
    expected = run(pipe)
    pipe.transformer.time_text_embed = InPlace(pipe.transformer.time_text_embed)
    assert torch.equal(run(pipe), expected)
    handle.undo()


def test_float16_is_clipped_as_diffusers_does() -> None:
    ours, theirs = (make_tiny_pipeline().to(torch.float16) for _ in range(2))
    for pipe in (ours, theirs):
        for block in pipe.transformer.transformer_blocks:
            block.ff_context.net[2].weight.mul_(1e5)
        for block in pipe.transformer.single_transformer_blocks:
            block.proj_out.weight.mul_(1e5)
    for block in blocks_of(theirs):
        add_hook_to_module(block, ModelHook())
    handles = [parallelize(pipe, **EXACT) for pipe in (ours, theirs)]
    outputs: list[list[Tensor]] = []
    for pipe in (ours, theirs):
        seen: list[Tensor] = []
        for block in blocks_of(pipe):
            block.register_forward_hook(lambda *call, seen=seen: seen.extend(call[-1]))
        pipe.transformer(**{k: x.half() for k, x in inputs(0.5).items()}, img_ids=raster(6, 5).half())
        outputs.append(seen)
    for handle in handles:
        handle.undo()
    text, _, text_after_single, image_after_single = outputs[0]
    assert all((x.abs() == 65_504).any() for x in (text, text_after_single, image_after_single))
    torch.testing.assert_close(*outputs, rtol=0, atol=0, equal_nan=True)


def raster(height: int, width: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(y), y, x], dim=-1).reshape(-1, 3).float()


def test_a_block_stays_what_it_is() -> None:
    pipe = make_tiny_pipeline()
    calls: list[type] = []
    before = blocks_of(pipe)
    for block in before:
        block.register_forward_hook(lambda block, *_: calls.append(type(block)))
    kinds, names = [type(block) for block in before], list(pipe.transformer.state_dict())
    handle = parallelize(pipe, **EXACT)
    assert list(pipe.transformer.state_dict()) == names
    assert all(now is block for now, block in zip(blocks_of(pipe), before, strict=True))
    run(pipe, steps=1)
    assert calls == [StripedDoubleBlock, StripedSingleBlock]
    handle.undo()
    assert [type(block) for block in before] == kinds
    assert torch.equal(run(pipe), run(make_tiny_pipeline()))


@pytest.mark.parametrize("batch", [1, 2])
def test_neighbours_in_memory_are_joined_without_a_copy(batch: int) -> None:
    whole = torch.randn(batch, 7, 3)
    again = joined(whole[:, :2], whole[:, 2:])
    assert torch.equal(again, whole) and again.data_ptr() == whole.data_ptr()
    apart = [
        (whole[:, :2], whole[:, 3:]),
        (whole[:, 2:], whole[:, :2]),
        (whole[:, :2], whole[:, 2:] + 1),
        (whole[:, :2, :2], whole[:, 2:, :2]),
        (whole[:, :2], whole[:, 2:4].clone()),
    ]
    if batch > 1:
        apart.append((whole[:, :2], whole[:, 2:6]))
    for pair in apart:
        assert torch.equal(joined(*pair), torch.cat(pair, dim=1))


def attention_that_only_makes_its_output() -> Any:
    """Stands in for a StripedModel: nothing but what every attention needs."""
    return SimpleNamespace(
        parts=Parts(),
        running_cut=SimpleNamespace(group=SimpleNamespace(size=1)),
        text_plan=plan_text(512, 1, 0),
        start_text=lambda layer, *qkv: None,
        start_halos=lambda layer, key, value, **kind: object(),
        attend=lambda layer, halos, query, key, value, out_BLND=None, **kind: (
            torch.empty_like(query) if out_BLND is None else out_BLND
        ),
    )


@pytest.mark.parametrize(("pixels", "most"), [(4096, 23.0), (8192, 30.0), (16384, 65.0)])
def test_memory_of_a_step_of_flux(pixels: int, most: float) -> None:
    """FLUX.1-dev in bfloat16 on one GPU with its modulation hoisted, counted; attention's working memory comes on top."""
    tokens, text = (pixels // 16) ** 2, 512
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True).to(torch.bfloat16)
        call = {
            "hidden_states": torch.empty(1, tokens, 64, dtype=torch.bfloat16),
            "encoder_hidden_states": torch.empty(1, text, 4096, dtype=torch.bfloat16),
            "pooled_projections": torch.empty(1, 768, dtype=torch.bfloat16),
            "timestep": torch.empty(1, dtype=torch.bfloat16),
            "guidance": torch.empty(1),
            "img_ids": torch.empty(tokens, 3),
            "txt_ids": torch.empty(text, 3),
        }
    striped = attention_that_only_makes_its_output()
    family = Flux(transformer)
    put_on(family, striped)
    weights = sum(x.nbytes for x in transformer.parameters())
    hoisted = sum(x.nbytes for norm in family.modulated.values() for x in norm.linear.parameters())
    with torch.no_grad(), Allocated() as allocated:
        transformer(**call)
    assert weights / GB == pytest.approx(23.8, abs=0.1)
    assert hoisted / GB == pytest.approx(6.46, abs=0.1)
    five = 5 * (tokens + text) * 3072 * 2
    assert five < allocated.peak < (most * GB - weights + hoisted)
