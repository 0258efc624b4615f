"""Bytes that a plan counts, and that ranks send; apart from tests that make groups in this process, as plans do."""

from typing import Any

import pytest
import torch

from clear_dist.comm.group import Group
from clear_dist.options import Options
from clear_dist.parallelize import parallelize
from clear_dist.plan.built import cut_down
from clear_dist.plan.questions import Module, StepQuestion
from clear_dist.plan.stepped import run_steps
from tests.families.z_image.test_transformer import PADDED, WHOLE, run
from tests.families.z_image.tiny import make_tiny_z_image
from tests.ranks import run_ranks

EXACT: dict[str, Any] = {"window": 4, "text_attention": "exact"}
COUNTED = ("halo_bytes_sent", "text_bytes_gathered", "text_bytes_reduced", "join_bytes")


def counted(group: Group, settings: dict[str, Any], size: tuple[int, int]) -> dict[str, int]:
    """Bytes of the last step."""
    pipe = make_tiny_z_image(layers=3, refiners=2)
    handle = parallelize(pipe, group=group, **settings)
    caption = torch.randn(64, 24, generator=torch.Generator().manual_seed(0))
    run(pipe, size, prompt=None, negative_prompt=None, prompt_embeds=[caption])
    found = handle.counters.as_dict()
    return {name: int(found[name][-1]) for name in COUNTED}


@pytest.mark.parametrize("settings", [EXACT, EXACT | {"text_tokens": "sharded"}, {"window": "full"}])
@pytest.mark.parametrize("size", [PADDED, WHOLE])
def test_a_plan_counts_what_is_sent(settings: dict[str, Any], size: tuple[int, int]) -> None:
    transformer = make_tiny_z_image(layers=3, refiners=2).transformer.to("meta")
    built = cut_down(transformer)
    question = StepQuestion(
        module=Module(kind="diffusers.ZImageTransformer2DModel", config={}),
        dtype="float32",
        device="cpu",
        ranks=2,
        options=Options(**settings).settled("full"),
        transport="gloo",
        height=size[0],
        width=size[1],
        rank=0,
        images=1,
        text_tokens=64,
        passes=1,
        down_factor=1,
        has_lora=False,
        steps=1,
    )
    planned = run_steps(question, built.copy())
    assert {name: planned["bytes"].get(name, 0) for name in COUNTED} == run_ranks(counted, 2, settings, size)[0]
    adapted = run_steps(StepQuestion(**vars(question) | {"has_lora": True}), built.copy())
    assert adapted["peak"]["activations"] >= planned["peak"]["activations"] > 0
