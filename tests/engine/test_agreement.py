"""What decides the picture and differs between ranks is told on all of them, before and after `parallelize`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline

import clear_dist
from clear_dist.comm.group import Group
from clear_dist.engine.agreement import adapters_of, fingerprint
from clear_dist.parallelize import parallelize
from tests.oracle import DenseClearProcessor
from tests.ranks import run_ranks
from tests.test_parallelize import run
from tests.tiny import make_tiny_pipeline
from tests.weights.test_hoisted_lora import adapt

Change = Callable[[FluxPipeline], Any]


def fuse_and_forget(pipe: FluxPipeline) -> None:
    pipe.transformer.fuse_lora()
    pipe.transformer.unload_lora()


def train_on(pipe: FluxPipeline) -> None:
    """Every weight by a little."""
    for weight in pipe.transformer.parameters():
        weight.data = weight.data * 1.01


def train_last(pipe: FluxPipeline) -> None:
    pipe.transformer.proj_out.weight.data *= 1.5


def another_processor(pipe: FluxPipeline) -> None:
    pipe.transformer.single_transformer_blocks[0].attn.set_processor(DenseClearProcessor(12, 6, 4))


WITHOUT: dict[str, tuple[Change, str]] = {
    "adapter": (adapt, "adapters"),
    "weights": (train_on, "weights"),
    "one weight": (train_last, "weights"),
}
WITH: dict[str, tuple[Change, str]] = {
    "scale": (lambda pipe: pipe.transformer.set_adapters("a", 0.5), "adapters"),
    "off": (lambda pipe: pipe.transformer.disable_lora(), "adapters"),
    "fused": (lambda pipe: pipe.transformer.fuse_lora(), "adapters"),
    "fused and forgotten": (fuse_and_forget, "adapters|weights"),
    "another": (lambda pipe: (pipe.transformer.delete_adapters("a"), adapt(pipe, targets=["to_k"])), "adapters"),
}


def told(group: Group, named: str, do: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=rf"same ({named})|^({named}) must be the same"):
        do()
    assert not group.agree(False), "all ranks are here"


def unlike(group: Group) -> None:
    for adapters, changes in ((False, WITHOUT), (True, WITH)):
        for change, named in changes.values():
            for before in (True, False):
                pipe = make_tiny_pipeline()
                if adapters:
                    adapt(pipe)
                if before and group.rank == 1:
                    change(pipe)
                if before:
                    told(group, named, lambda pipe=pipe: parallelize(pipe, window=4, group=group))
                    continue
                parallelize(pipe, window=4, group=group)
                run(pipe, height=4, width=4, steps=1)
                if group.rank == 1:
                    change(pipe)
                told(group, named, lambda pipe=pipe: run(pipe, height=4, width=4, steps=1))


def test_models_unlike_on_ranks_are_told_on_all() -> None:
    run_ranks(unlike, 2)


def unlike_calls(group: Group) -> str:
    pipe = make_tiny_pipeline(sample_size=64)
    adapt(pipe)
    parallelize(pipe, window=4, group=group)
    scale = {"joint_attention_kwargs": {"scale": 0.5 + 0.25 * group.rank}}
    told(group, "noise, pictures, scales", lambda: run(pipe, height=4, width=4, **scale))
    sigmas = {"sigmas": [1.0, 0.8 - 0.3 * group.rank]}
    told(group, "schedule", lambda: run(pipe, height=4, width=4, **sigmas))
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight.mul_(1 + group.rank)
    told(group, "vae", lambda: clear_dist.generate(pipe, "a hill", height=64, width=64, num_inference_steps=1))
    if group.rank == 1:
        another_processor(pipe)
    with pytest.raises(ValueError, match=r"of single_transformer_blocks\.0\.attn\.processor must stay") as caught:
        run(pipe, height=4, width=4)
    return str(caught.value)


def unlike_encoders(group: Group) -> None:
    pipe = make_tiny_pipeline()
    pipe.text_encoder = torch.nn.LayerNorm(8)
    if group.rank == 1:
        pipe.text_encoder.weight.data *= 1.01
    told(group, "text_encoder", lambda: parallelize(pipe, window=4, group=group))
    if group.rank == 1:
        pipe.text_encoder = None
    parallelize(pipe, window=4, group=group)


def test_text_encoders_unlike_on_ranks_that_have_them_are_told() -> None:
    run_ranks(unlike_encoders, 2)


def test_what_one_rank_refuses_is_told_on_all() -> None:
    first, second = run_ranks(unlike_calls, 2)
    assert first == f"rank 1 refuses: {second}"


def test_fingerprints_are_of_names_shapes_dtypes_and_values() -> None:
    def of(*layers: Any) -> str:
        return fingerprint(torch.nn.Sequential(*layers))

    torch.manual_seed(1)
    first, second = torch.nn.Linear(40, 30), torch.nn.Linear(40, 30)
    prints = [of(first), of(second), of(first, second), of(torch.nn.Identity(), first), of(first.bfloat16())]
    assert len(set(prints)) == len(prints)
    assert of(first) == of(first) and "2 tensors" in of(first)
    wide = torch.nn.Linear(8, 8).half()
    transposed = torch.nn.Linear(8, 8).half()
    transposed.load_state_dict(wide.state_dict())
    transposed.weight.data = transposed.weight.data.t().contiguous().t()
    assert of(wide) == of(transposed), "whatever the layout"


def test_adapters_are_shown_with_their_scales() -> None:
    pipe = make_tiny_pipeline()
    assert adapters_of(pipe.transformer).startswith("none (")
    adapt(pipe)
    pipe.transformer.set_adapters("a", 0.25)
    alpha_over_rank = 8 / 2
    assert adapters_of(pipe.transformer).startswith(f"a x {0.25 * alpha_over_rank:g} (")
