"""Models and prompts that are not as others, replayed: to the bit what they draw without graphs."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import peft
import pytest
import torch

from clear_dist.comm.group import Group
from clear_dist.engine.extrapolation import Extrapolation
from clear_dist.engine.pooled_keys import Pooling
from tests.engine.test_graphs import EXACT, SHARDED, STEPS, Recorder, excluded, on_stripes
from tests.ranks import run_ranks
from tests.test_parallelize import run
from tests.tiny import make_tiny_pipeline

ABOVE = Extrapolation(native_tokens=20, ntk_factor=10.0, position_scale=0.5)
SIZE = {"height": 12, "width": 10}


def adapted() -> Any:
    pipe = make_tiny_pipeline()
    torch.manual_seed(3)
    targets = ["to_q", "to_k", "proj_mlp", "norm.linear"]
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "a")
    return pipe


def compared(
    group: Group,
    make: Callable[[], Any],
    chosen: dict[str, Any],
    pictures: list[dict[str, Any]],
    extrapolation: Extrapolation | None = None,
    factor: int = 1,
) -> tuple[list[bool], int, int]:
    """Whether each picture is right; captures and replays of all."""
    generator = torch.Generator().manual_seed(5)
    weights = tuple(torch.rand(factor, factor, generator=generator) for _ in range(2))
    pooling = Pooling(weights=weights) if factor > 1 else None
    recorder, drawn = Recorder(), []
    for capture in (None, recorder):
        pipe = make()
        striped = on_stripes(pipe, group, chosen, capture, pooling)
        with nullcontext() if extrapolation is None else striped.running(extrapolation=extrapolation):
            drawn.append([run(pipe, **{"steps": STEPS} | SIZE | picture) for picture in pictures])
        striped.remove()
    return list(map(torch.equal, *drawn)), recorder.captures, recorder.replays


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    ("chosen", "extrapolation", "factor"),
    [(EXACT, ABOVE, 1), (EXACT, None, 2), (EXACT | {"int8": True}, None, 1)],
    ids=["above native size", "down-sampled keys", "int8"],
)
def test_other_positions_keys_and_weights(
    size: int, chosen: dict[str, Any], extrapolation: Extrapolation | None, factor: int
) -> None:
    case = (make_tiny_pipeline, chosen, [{}, {"seed": 8}], extrapolation, factor)
    assert run_ranks(compared, size, *case) == [([True, True], 2, 2 * (STEPS - 1))] * size


def weaker(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
    if step == 2:
        pipe.transformer.set_adapters("a", 0.25)
    return {}


def scaled(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
    if step == 2:
        pipe._joint_attention_kwargs = {"scale": 0.25}
    return {}


@pytest.mark.parametrize("size", [1, 2])
def test_a_loras_scale_is_an_argument_of_each_forward(size: int) -> None:
    pictures = [{"joint_attention_kwargs": {"scale": scale}} for scale in (0.5, 1.0)]
    assert run_ranks(compared, size, adapted, EXACT, pictures) == [([True, True], 2, 2 * (STEPS - 1))] * size


@pytest.mark.parametrize("change", [weaker, scaled])
def test_a_loras_scale_that_changes_within_a_picture(change: Callable[..., dict[str, Any]]) -> None:
    """Its steps to come are drawn without a graph, all of the next picture's but the first with one."""
    pictures = [{"callback_on_step_end": change}, {}]
    assert run_ranks(compared, 2, adapted, EXACT, pictures) == [([True, True], 2, 2 + STEPS - 1)] * 2


def with_a_longer_negative_prompt(pipe: Any) -> None:
    stock = pipe.encode_prompt

    def encode(prompt: Any, **arguments: Any) -> Any:
        return stock(prompt, **arguments | {"max_sequence_length": 10 if prompt == "fog" else 9})

    pipe.encode_prompt = encode


def test_prompts_of_equal_shares_on_one_rank_only_have_graphs_of_their_own() -> None:
    """9 and 10 tokens: two ranks have 5 and 4, then 5 and 5."""
    picture = {"negative_prompt": "fog", "true_cfg_scale": 2.0}
    for size in (1, 2):
        found = run_ranks(excluded, size, SHARDED, picture, with_a_longer_negative_prompt)
        assert found == [(True, 2)] * size
