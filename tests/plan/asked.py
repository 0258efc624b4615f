"""Requests to be planned, and the engine that answers, one for all tests of a process."""

from dataclasses import replace
from functools import cache
from typing import Any

from clear_dist.cards.card import TextEncoders
from clear_dist.engine.strided import scale_of
from clear_dist.families.cards import CARDS
from clear_dist.families.flux.card import FLUX_DEV
from clear_dist.launch.env import Place
from clear_dist.plan import GPUS, LINKS, PlanRequest, model
from clear_dist.plan.model import PlannedModel
from clear_dist.plan.questions import Module
from clear_dist.request.flags import PlanFlags
from clear_dist.request.settle import choose


@cache
def flux() -> PlanRequest:
    """FLUX.1-dev at 8192 px with radius 16 on 8 H100s."""
    flags = PlanFlags(model=FLUX_DEV, res=8192, nproc=8, gpu="h100")
    request, facts, _ = choose(flags, Place(), CARDS, device="cuda", gpus=())
    known = model.find(facts)
    assert known is not None
    return PlanRequest(request=request, model=known, gpu=GPUS["h100"], link=LINKS["nvlink"])


def flux_request(**settings: Any) -> PlanRequest:
    """`flux`, but for these fields of its own and of its request."""
    own = {name: settings.pop(name) for name in ("gpu", "link", "forked", "shares_gpus") if name in settings}
    if own.get("gpu", "some") is None:
        settings |= {"device": "cpu"}
    return replace(flux(), **own).changed(**settings)


def planned_model(pipe: Any) -> PlannedModel:
    """A tiny pipeline's."""
    t5 = pipe.text_encoder_2.config
    numbers = sum(x.numel() for part in (pipe.text_encoder, pipe.text_encoder_2) for x in part.parameters())
    modules = (
        Module(kind=f"diffusers.{type(part).__name__}", config=dict(part.config))
        for part in (pipe.transformer, pipe.vae)
    )
    return PlannedModel(
        name="tiny",
        **dict(zip(("transformer", "vae"), modules, strict=True)),
        text=TextEncoders(numbers=numbers, heads=t5.num_heads, channels=t5.d_model, hidden=t5.d_ff),
        token=2 * scale_of(pipe.vae),
        packing=2,
        channels=pipe.transformer.config.in_channels,
    )


def tiny_request(pipe: Any, **settings: Any) -> PlanRequest:
    """A tiny pipeline in float32 on a CPU."""
    asked = replace(flux(), model=planned_model(pipe), gpu=None, link=LINKS["memory"])
    usual = {"device": "cpu", "dtype": "float32", "text_attention": "exact", "warmup_steps": 1}
    usual |= {"token_size": asked.model.token}
    return asked.changed(**usual | settings)
