"""Each rank takes a share of the text through the blocks: the same numbers, and so much less work, from where it pays."""

from functools import cache
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import FluxPipeline
from torch import Tensor

from clear_dist.comm.group import Group
from clear_dist.engine import parts
from clear_dist.engine.extrapolation import Extrapolation
from clear_dist.engine.striped import require_striped
from clear_dist.parallelize import parallelize
from tests.engine import test_extrapolation
from tests.engine.stopping import Stop
from tests.families.flux.test_blocks import blocks_of, raster
from tests.oracle import DenseClearProcessor
from tests.ranks import run_ranks
from tests.test_parallelize import HEIGHT, WIDTH, relative_error, run
from tests.tiny import CLIP_WIDTH, T5_WIDTH, make_tiny_pipeline
from tests.weights.test_hoisted_lora import adapt

EXACT: dict[str, Any] = {"window": 4, "text_attention": "exact"}
AVERAGE: dict[str, Any] = {"window": 4, "text_attention": "average"}
FULL: dict[str, Any] = {"window": "full"}
SHARDED: dict[str, Any] = {"text_tokens": "sharded"}


def make_pipeline() -> FluxPipeline:
    """Text goes from one double block to another, into single blocks, and from one of them to another."""
    return make_tiny_pipeline(double_blocks=2, single_blocks=2)


def prompt_of(tokens: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(tokens)
    return {
        "prompt": None,
        "prompt_embeds": torch.randn(1, tokens, T5_WIDTH, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, CLIP_WIDTH, generator=generator),
    }


def striped_latents(group: Group, cases: list[dict[str, Any]], tokens: list[int]) -> list[Tensor]:
    """Latents of each case with each number of text tokens; uninitialised memory is NaN."""
    torch.use_deterministic_algorithms(True)
    pipe = make_pipeline()
    results = []
    for case in cases:
        handle = parallelize(pipe, group=group, **case)
        results += [run(pipe, steps=2, **prompt_of(number)) for number in tokens]
        handle.undo()
    return results


@cache
def one_process(kind: str, tokens: int, ranks: int) -> Tensor:
    """Unmodified diffusers, `full` with its own attention; `ranks`: those of Eq. 7."""
    pipe = make_pipeline()
    if kind != "full":
        heights = [HEIGHT // ranks + (rank < HEIGHT % ranks) for rank in range(ranks)]
        stripes = [range(sum(heights[:rank]), sum(heights[: rank + 1])) for rank in range(ranks)]
        parts_of_text = stripes if kind == "average" else None
        pipe.transformer.set_attn_processor(DenseClearProcessor(HEIGHT, WIDTH, 4, parts_of_text))
    return run(pipe, steps=2, **prompt_of(tokens))


@pytest.mark.parametrize("text_tokens", ["sharded", "replicated"])
@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_n_ranks_compute_what_one_process_computes(size: int, text_tokens: str) -> None:
    """9 tokens: uneven shares; 2: empty ones from 3 ranks on."""
    cases = [settings | {"text_tokens": text_tokens} for settings in (EXACT, AVERAGE, FULL)]
    tokens = [9, 2]
    expected = [one_process(kind, number, size) for kind in ("exact", "average", "full") for number in tokens]
    for results in run_ranks(striped_latents, size, cases, tokens):
        for latents, right in zip(results, expected, strict=True):
            assert relative_error(latents, right) < 1e-4


def with_everything(group: Group) -> list[Tensor]:
    """Guidance and a batch; chunks of 7 tokens; LoRA on the text's layers; hoisted modulation; others' hooks."""
    pipes = [make_pipeline() for _ in range(5)]
    adapt(pipes[2], targets=["add_q_proj", "to_add_out", "ff_context.net.2", "to_v", "proj_out"])
    for block in blocks_of(pipes[4]):  # diffusers' own forward, which calls the processor
        add_hook_to_module(block, ModelHook())
    handles = [
        parallelize(pipe, group=group, hoist_modulation=number == 3, **EXACT, **SHARDED)
        for number, pipe in enumerate(pipes)
    ]
    results = [run(pipes[0], prompt=["a hill", "the sea"], negative_prompt=["fog", "rain"], true_cfg_scale=2.0)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "MOST_TOKENS", 7)
        results.append(run(pipes[1]))
    results += [run(pipe) for pipe in pipes[2:]]
    for handle in handles:
        handle.undo()
    return [*results, run(pipes[0])]


def test_with_what_else_there_is() -> None:
    (expected,) = run_ranks(with_everything, 1)
    for results in run_ranks(with_everything, 3):
        for latents, right in zip(results, expected, strict=True):
            assert relative_error(latents, right) < 1e-4
    assert relative_error(expected[2], expected[1]) > 1e-2  # the LoRA is one


def above_the_native_size(group: Group, extrapolation: Extrapolation) -> Tensor:
    pipe = make_tiny_pipeline()
    parallelize(pipe, group=group, **EXACT, **SHARDED)
    with require_striped(pipe).running(extrapolation=extrapolation):
        return run(pipe, seed=test_extrapolation.SEED)


def test_scores_are_scaled_by_all_text_tokens() -> None:
    for latents in run_ranks(above_the_native_size, 3, test_extrapolation.PAPER):
        assert relative_error(latents, test_extrapolation.oracle_latents(4, test_extrapolation.PAPER)) < 1e-4


def two_passes(pipe: FluxPipeline) -> list[Tensor]:
    """Their texts differ in length; FLUX gives all text tokens the position 0, these have one each."""
    generator = torch.Generator().manual_seed(3)
    common = {
        "hidden_states": torch.randn(1, HEIGHT * WIDTH, 64, generator=generator),
        "pooled_projections": torch.randn(1, CLIP_WIDTH, generator=generator),
        "img_ids": raster(HEIGHT, WIDTH),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
    }
    pipe.scheduler.set_timesteps(3, mu=1.0)
    samples = []
    for tokens in (7, 4):
        text = torch.randn(1, tokens, T5_WIDTH, generator=generator)
        ids = torch.randint(0, 50, (tokens, 3), generator=generator).float()
        samples.append(pipe.transformer(**common, encoder_hidden_states=text, txt_ids=ids).sample)
    return samples


def striped_passes(group: Group) -> list[Tensor]:
    pipe = make_pipeline()
    parallelize(pipe, group=group, **EXACT, **SHARDED)
    return two_passes(pipe)


def test_positions_are_cut_with_the_text_and_passes_may_differ_in_length() -> None:
    pipe = make_pipeline()
    pipe.transformer.set_attn_processor(DenseClearProcessor(HEIGHT, WIDTH, 4))
    expected = two_passes(pipe)
    for samples in run_ranks(striped_passes, 3):
        for sample, right in zip(samples, expected, strict=True):
            assert relative_error(sample, right) < 1e-4


def watched(group: Group) -> tuple[set[int], list[str]]:
    """Text tokens that linear layers see on this rank, and what happens in which order in one step."""
    pipe = make_tiny_pipeline()
    handle = parallelize(pipe, group=group, **EXACT, **SHARDED)
    double, single = blocks_of(pipe)
    seen: set[int] = set()
    events: list[str] = []

    def look(name: str) -> None:
        counted = handle.counters.as_dict()
        events.append(f"{name}: {counted['text_bytes_gathered'][0] > 0}, {counted['halo_messages_sent'][0] > 0}")

    layers = (double.attn.add_q_proj, double.attn.to_add_out, double.ff_context, pipe.transformer.context_embedder)
    for layer in layers:
        layer.register_forward_hook(lambda layer, inputs, output: seen.add(output.shape[1]))
    # Beside whole rows of the image.
    single.attn.to_q.register_forward_hook(lambda layer, inputs, output: seen.add(output.shape[1] % WIDTH))
    double.attn.to_k.register_forward_pre_hook(lambda *_: look("keys of the image"))
    double.attn.to_q.register_forward_pre_hook(lambda *_: look("queries of the image"))
    run(pipe, steps=1)
    return seen, events


def test_linear_layers_see_a_share_and_what_leaves_is_computed_first() -> None:
    for rank, (seen, events) in enumerate(run_ranks(watched, 2)):
        assert seen == {5 - rank}
        assert events == ["keys of the image: True, False", "queries of the image: True, True"]


def stopped(group: Group) -> Tensor:
    """Stops between the text's start and its end, on all ranks; then once more."""
    pipe = make_pipeline()
    parallelize(pipe, group=group, **EXACT, **SHARDED)

    def stop(*_: Any) -> None:
        raise Stop

    hook = pipe.transformer.transformer_blocks[1].attn.to_k.register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        run(pipe)
    hook.remove()
    return run(pipe, steps=2, **prompt_of(9))


def test_a_forward_that_broke_off_leaves_nothing_behind() -> None:
    for latents in run_ranks(stopped, 3):
        assert relative_error(latents, one_process("exact", 9, 3)) < 1e-4


def counted(group: Group, case: dict[str, Any], height: int, transport: str) -> tuple[list[int], list[int]]:
    group = Group.create("cpu", transport=transport)
    pipe = make_tiny_pipeline()
    handle = parallelize(pipe, group=group, **case)
    run(pipe, steps=2, height=height)
    found = handle.counters.as_dict()
    return found["text_bytes_gathered"], found["text_bytes_reduced"]


AVERAGED, WEIGHED = 9 * 2 * 16, 9 * 2 * 17
"""Numbers of the text queries' output: 9 tokens, 2 heads of 16; with their weights, or log-sum-exps."""
MAXIMA = 9 * 2


@pytest.mark.parametrize(
    ("case", "gathered", "reduced"),
    [
        (AVERAGE | SHARDED, 3 * 5 * 32, AVERAGED),
        (EXACT | SHARDED, 3 * 5 * 32, WEIGHED),
        (FULL | SHARDED, 3 * 5 * 32, 0),
        (EXACT | {"text_tokens": "replicated"}, 0, WEIGHED + MAXIMA),
        (FULL | {"text_tokens": "replicated"}, 0, 0),
    ],
    ids=str,
)
def test_bytes_of_a_step(case: dict[str, Any], gathered: int, reduced: int) -> None:
    """Two layers in float32; the longer of two shares has 5 tokens, of 32 channels."""
    for found in run_ranks(counted, 2, case, HEIGHT, "gloo"):
        assert found == ([2 * gathered * 4] * 2, [2 * reduced * 4] * 2)


@pytest.mark.parametrize(
    ("settings", "height", "transport", "is_shared"),
    [
        ({}, HEIGHT, "gloo", True),  # 9 of 80 tokens or so
        ({}, 2 * HEIGHT, "gloo", False),  # 9 of 152
        (SHARDED, 2 * HEIGHT, "gloo", True),
        ({}, HEIGHT, "host", False),
        (SHARDED, HEIGHT, "host", True),
        ({"schedule": "stale", "warmup_steps": 1}, HEIGHT, "gloo", False),
        ({"schedule": "stale", "warmup_steps": 2}, HEIGHT, "gloo", True),  # all warm-up, so as in sync
    ],
)
def test_what_auto_chooses(settings: dict[str, Any], height: int, transport: str, is_shared: bool) -> None:
    for gathered, _ in run_ranks(counted, 2, EXACT | settings, height, transport):
        assert [amount > 0 for amount in gathered] == [is_shared] * 2


def unequal_settings(group: Group) -> None:
    with pytest.raises(ValueError, match="text_tokens must be the same on all ranks, got sharded, replicated"):
        parallelize(make_tiny_pipeline(), text_tokens=("sharded", "replicated")[group.rank], group=group)


def test_ranks_with_different_settings_are_told() -> None:
    run_ranks(unequal_settings, 2)
