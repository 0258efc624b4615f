"""LoRA on layers whose weights are in host memory: loaded before and after, scaled, switched, fused, and refused."""

from collections.abc import Callable, Sequence
from typing import Any

import peft
import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

from clear_dist.parallelize import parallelize
from tests.test_parallelize import relative_error, run
from tests.tiny import make_tiny_pipeline

TARGETS = ["norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear", "to_q"]
EMBEDDER = "timestep_embedder.linear_1"


def adapt(pipe: FluxPipeline, name: str = "a", *, targets: Sequence[str] = TARGETS) -> None:
    torch.manual_seed(ord(name))
    config = peft.LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False)
    pipe.transformer.add_adapter(config, adapter_name=name)


def switched(pipe: FluxPipeline) -> Tensor:
    """Adapter b in the second step, a in later ones."""

    def switch(pipe: Any, step: int, _: Any, __: Any) -> dict[str, Any]:
        pipe.transformer.set_adapters("b" if step == 0 else "a")
        return {}

    return run(pipe, callback_on_step_end=switch)


def off(pipe: FluxPipeline) -> Tensor:
    pipe.transformer.disable_lora()
    latents = run(pipe)
    pipe.transformer.enable_lora()
    return latents


def fused(pipe: FluxPipeline) -> Tensor:
    """Amid a generation, by steps of which none begins one."""

    def fuse(pipe: Any, step: int, _: Any, __: Any) -> dict[str, Any]:
        (pipe.transformer.fuse_lora if step == 0 else pipe.transformer.unfuse_lora)()
        return {}

    return run(pipe, callback_on_step_end=fuse)


def unloaded(pipe: FluxPipeline) -> Tensor:
    pipe.transformer.unload_lora()
    return run(pipe)


USES: dict[str, Callable[[FluxPipeline], Tensor]] = {
    "as it is": run,
    "scaled": lambda pipe: run(pipe, joint_attention_kwargs={"scale": 0.3}),
    "switched": switched,
    "off": off,
    "fused": fused,
    "unloaded": unloaded,
}


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_lora_is_what_it_is_without_hoisting(before: bool) -> None:
    stock, hoisted = make_tiny_pipeline(), make_tiny_pipeline()
    handles = []
    for pipe, hoist in ((stock, False), (hoisted, True)):
        if before:
            adapt(pipe, targets=[*TARGETS, EMBEDDER])
            adapt(pipe, "b")
        handles.append(parallelize(pipe, window=4, text_attention="exact", hoist_modulation=hoist))
        if not before:
            run(pipe)
            adapt(pipe)
            adapt(pipe, "b")
    try:
        latents = {name: (use(hoisted), use(stock)) for name, use in USES.items()}
        assert [name for name, (ours, theirs) in latents.items() if not torch.equal(ours, theirs)] == []
        assert relative_error(latents["off"][1], latents["as it is"][1]) > 1e-2
        adapt(hoisted)
        handles[1].undo()
        assert type(hoisted.transformer.norm_out.linear.base_layer) is torch.nn.Linear
    finally:
        for handle in handles:
            handle.undo()


@pytest.mark.parametrize(
    ("config", "got"),
    [
        (lambda: peft.LoraConfig(r=2, target_modules=TARGETS, use_dora=True), "a variant of LoRA such as DoRA"),
        (lambda: peft.OFTConfig(r=2, oft_block_size=0, target_modules=["norm.linear"]), "peft.tuners.oft"),
        (
            lambda: peft.IA3Config(target_modules=["norm.linear"], feedforward_modules=["norm.linear"]),
            "peft.tuners.ia3",
        ),
    ],
    ids=["DoRA", "OFT", "IA3"],
)
def test_what_does_more_than_add_is_refused(config: Callable[[], Any], got: str) -> None:
    pipe = make_tiny_pipeline()
    handle = parallelize(pipe, window=4, hoist_modulation=True)
    try:
        pipe.transformer.add_adapter(config())
        with pytest.raises(ValueError, match=rf"takes LoRA and nothing else on .*norm.*\.linear, got {got}"):
            run(pipe)
    finally:
        handle.undo()


def test_a_disabled_fused_lora_is_refused() -> None:
    """peft unfuses it where the layer is called, after what the layer gives was computed."""
    pipe = make_tiny_pipeline()
    handle = parallelize(pipe, window=4, hoist_modulation=True)
    try:
        adapt(pipe)
        pipe.transformer.fuse_lora()
        pipe.transformer.disable_lora()
        with pytest.raises(ValueError, match=r"fused LoRA on .*\.linear is disabled; call pipe\.unfuse_lora"):
            run(pipe)
    finally:
        handle.undo()
