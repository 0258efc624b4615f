from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from clear_dist.options import Refusal, read_window
from clear_dist.request.flags import GenerateFlags

WRONG = [
    ({"res": 0}, "--res must be from 16 to 16384, got 0; nearest: 16"),
    ({"height": -64}, "--height must be from 16 to 32768, got -64; nearest: 16"),
    ({"width": 10**9}, "nearest: 32768"),
    ({"steps": 0}, "--steps must be from 1 to 1000, got 0; nearest: 1"),
    ({"num_images": 0}, "--num-images"),
    ({"nproc": 0}, "--nproc"),
    ({"seed": -1}, "--seed must be from 0 to 9223372036854775807, got -1; nearest: 0"),
    ({"max_sequence_length": 513}, "--max-sequence-length must be from 1 to 512, got 513; nearest: 512"),
    ({"guidance_scale": float("nan")}, "--guidance-scale must be a number from 0 to 100, got nan; nearest: 0"),
    ({"guidance_scale": float("inf")}, "got inf; nearest: 100"),
    ({"true_cfg_scale": 0.5}, "--true-cfg-scale must be a number from 1 to 100, got 0.5; nearest: 1"),
    ({"window": 0}, "--window must be from 1 to 8192, got 0; nearest: 1"),
    ({"window": -3}, "--window must be from 1 to 8192, got -3; nearest: 1"),
    ({"window": "circle"}, "--window must be a radius in tokens, or full, got 'circle'"),
    ({"text_attention": "exakt"}, "--text-attention must be one of average, exact, got 'exakt'; nearest: exact"),
    (
        {"text_tokens": "shared"},
        "--text-tokens must be one of auto, replicated, sharded, got 'shared'; nearest: sharded",
    ),
    (
        {"text_tokens": "sharded", "schedule": "stale"},
        "--text-tokens must be replicated with --schedule stale, got sharded; nearest: replicated",
    ),
    ({"schedule": "stail"}, "--schedule must be one of sync, stale, got 'stail'; nearest: stale"),
    ({"warmup_steps": -1}, "--warmup-steps must be from 0 to 1000, got -1; nearest: 0"),
    ({"attention_backend": "flx"}, "nearest: flex"),
    ({"dtype": "bf16"}, "nearest: bfloat16"),
    ({"device": "gpu"}, "--device must be one of auto, cpu, cuda"),
    ({"res": 64, "width": 64}, "--res is both height and width, got --width too"),
    ({"prompt": "a", "prompts": Path("b")}, "either a prompt or --prompts"),
    ({"window": read_window("9" * 5_000)}, "999...; nearest: 8192"),
    ({"window": read_window("-" + "9" * 5_000)}, "nearest: 1"),
    ({"window": "x" * 5_000}, "xxx...'; nearest: 8 or full"),
    ({"prompt": "sea\udcff"}, r"the prompt must be UTF-8, got 'sea\udcff'; nearest: 'sea'"),
    ({"negative_prompt": "\udcfffog"}, "--negative-prompt must be UTF-8"),
    ({"strength": 0.0}, "--strength must be a number from 0.001 to 1, got 0.0; nearest: 0.001"),
    ({"strength": 1.5}, "--strength must be a number from 0.001 to 1, got 1.5; nearest: 1"),
    ({"strength": float("nan")}, "nearest: 0.001"),
    ({"ntk_factor": 0.1}, "--ntk-factor must be a number from 1 to 1000, got 0.1; nearest: 1"),
    ({"cascade": "on"}, "--cascade must be one of auto, off, got 'on'"),
    ({"base_res": 0}, "--base-res must be from 16 to 16384, got 0; nearest: 16"),
    ({"upscale_steps": 0}, "--upscale-steps must be from 1"),
    ({"preview_every": 0}, "--preview-every must be from 1"),
    ({"output": Path("\udcff.png")}, r"--output must be UTF-8, got '\udcff.png'; nearest: '.png'"),
]


@pytest.mark.parametrize(("given", "message"), WRONG)
def test_mistakes_are_refused_with_the_nearest_valid_value(given: dict[str, Any], message: str) -> None:
    with pytest.raises(Refusal) as caught:
        GenerateFlags(**given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_is_required_and_nothing_changes_later() -> None:
    flags = GenerateFlags()
    assert flags.window is None
    with pytest.raises(FrozenInstanceError):
        flags.seed = 1  # type: ignore[misc]
