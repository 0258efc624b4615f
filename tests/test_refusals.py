"""Where `parallelize` refuses, the pipeline is as it was: no stripes, no hooks, no group."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from clear_dist.parallelize import on_refusal, parallelize
from clear_dist.weights.quantised import Int8Linear
from tests.test_parallelize import run
from tests.tiny import make_tiny_pipeline
from tests.tiny_controlnet import make_tiny_controlled, make_tiny_controlnet, picture
from tests.weights.test_hoisted_lora import adapt


def state(pipe: Any) -> dict[str, Any]:
    """Class, hooks and weights of every module."""
    models = [getattr(pipe, name, None) for name in ("transformer", "controlnet", "text_encoder", "vae")]
    return {
        f"{number}.{name}": (
            type(module),
            type(getattr(module, "processor", None)),
            len(module._forward_hooks) + len(module._forward_pre_hooks),
            hasattr(module, "_hf_hook"),
            [id(weight) for weight in module.parameters(recurse=False)],
        )
        for number, model in enumerate(models)
        if model is not None
        for name, module in model.named_modules()
    }


def offloaded_by_diffusers(pipe: Any) -> dict[str, Any]:
    pipe.vae._hf_hook = object()
    return {"offload": True, "hoist_modulation": True}


def with_lora(pipe: Any) -> dict[str, Any]:
    adapt(pipe, targets=["to_q"])
    return {"int8": True, "hoist_modulation": True, "offload": True}


def with_lora_on_its_controlnet(pipe: Any) -> dict[str, Any]:
    """The transformer could be quantised, which nothing would undo."""
    pipe.controlnet.transformer_blocks[0].attn.to_q = nn.Identity()
    return {"int8": True, "offload": True}


def with_another_layer_in_its_controlnet(pipe: Any) -> dict[str, Any]:
    pipe.controlnet.transformer_blocks[0].norm1.linear = nn.Identity()
    return {"hoist_modulation": True, "offload": True}


REFUSED = {
    offloaded_by_diffusers: "diffusers' own offloading exclude each other",
    with_lora: "int8 needs plain linear layers, got a Linear for .*to_q; load LoRA after parallelize",
    with_lora_on_its_controlnet: "int8 needs plain linear layers, got a Identity",
    with_another_layer_in_its_controlnet: "hoist_modulation needs plain linear layers",
}


@pytest.mark.parametrize("prepare", REFUSED, ids=lambda prepare: prepare.__name__)
def test_nothing_is_left_behind(prepare: Any) -> None:
    pipe = make_tiny_controlled(make_tiny_controlnet())
    arguments = prepare(pipe)
    before = state(pipe)
    with pytest.raises(ValueError, match=REFUSED[prepare]):
        parallelize(pipe, window=4, **arguments)
    assert state(pipe) == before
    assert not any(isinstance(layer, Int8Linear) for layer in pipe.transformer.modules())
    assert not dist.is_initialized()


def test_after_a_refusal_it_can_be_asked_again() -> None:
    pipe = make_tiny_controlled(make_tiny_controlnet())
    control = picture(13, 11, 1)
    stock = run(pipe, control_image=control, steps=1)
    adapt(pipe, targets=["to_q"])
    with pytest.raises(ValueError, match="load LoRA after parallelize"):
        parallelize(pipe, window=4, int8=True, hoist_modulation=True)
    pipe.transformer.delete_adapters("a")
    handle = parallelize(pipe, window="full", hoist_modulation=True)
    latents = run(pipe, control_image=control, steps=1)
    handle.undo()
    assert (latents - stock).norm() < 1e-4 * stock.norm()
    assert torch.equal(run(pipe, control_image=control, steps=1), stock)


def refuse(error: type[Exception], done: list[int]) -> None:
    with on_refusal() as undo:
        undo.append(lambda: done.append(1))
        undo.append(lambda: done.append(2))
        raise error


@pytest.mark.parametrize(("error", "undone"), [(ValueError, [2, 1]), (RuntimeError, [])])
def test_groups_are_closed_after_a_refusal_and_not_after_a_lost_peer(error: type[Exception], undone: list[int]) -> None:
    done: list[int] = []
    with pytest.raises(error):
        refuse(error, done)
    assert done == undone


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "^window must be from 1 to 8192, got 0; nearest: 1$"),
        ({"window": "ful"}, "^window must be a radius in tokens, or full, got 'ful'; nearest: 8 or full$"),
        (
            {"window": 4, "text_attention": "mean"},
            "^text_attention must be one of average, exact, got 'mean'; nearest: exact$",
        ),
        (
            {"window": "full", "text_attention": "average"},
            "^text_attention must be exact where the window is full, got average; nearest: exact$",
        ),
        (
            {"window": 4, "attention_backend": "tild"},
            "^attention_backend must be one of auto, .*, got 'tild'; nearest: tiled$",
        ),
        ({"window": 4, "text_tokens": "shared"}, "one of auto, replicated, sharded, got 'shared'; nearest: sharded"),
        ({"text_tokens": "sharded", "schedule": "stale"}, "text_tokens must be replicated with schedule stale"),
        ({"window": 4, "schedule": "late"}, "^schedule must be one of sync, stale, got 'late'; nearest: stale$"),
        ({"window": 4, "warmup_steps": -1}, "^warmup_steps must be from 0 to 1000, got -1; nearest: 0$"),
        (
            {"window": 4, "schedule": "stale", "warmup_steps": 1.5},
            "^warmup_steps must be a whole number from 0 to 1000, got 1.5; nearest: 0$",
        ),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_changed(arguments: dict[str, Any], message: str) -> None:
    pipe = make_tiny_pipeline()
    before = dict(pipe.transformer.attn_processors)
    with pytest.raises(ValueError, match=message):
        parallelize(pipe, **arguments)
    assert pipe.transformer.attn_processors == before


def test_an_unknown_option_is_refused_with_the_nearest() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'windw'; nearest: window"):
        parallelize(make_tiny_pipeline(), windw=4)
