"""Lines for the user: choices made for them, and flags that will have no effect."""

import math
from collections.abc import Iterable, Iterator

from clear_dist import demo
from clear_dist.cards.card import Cards
from clear_dist.cards.clear import named_down_factor, radius_of
from clear_dist.cards.folder import ModelFacts
from clear_dist.cards.headers import component_files, read_tensors
from clear_dist.options import shortened
from clear_dist.request.flags import PictureFlags
from clear_dist.request.request import Request
from clear_dist.stages import Stage, Upscaling

STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""dtypes by their names in safetensors files."""
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
WORTH_A_WORD = 1_000_000_000
"""Bytes."""


def casting(request: Request, facts: ModelFacts, ranks: int) -> Iterator[str]:
    """A warning where ranks on CPUs each cast weights that they could share.

    Args:
        ranks: on this machine.
    """
    if request.device != "cpu" or ranks == 1 or facts.folder is None:
        return
    assert facts.card is not None, "known with the folder"
    stored = [
        kind
        for file in component_files(facts.folder / "transformer", facts.card.weights["transformer"])
        for kind in read_tensors(file).values()
    ]
    cast = sum(math.prod(shape) for dtype, shape in stored if dtype != STORED[request.dtype])
    nbytes = cast * ITEMSIZE[request.dtype]
    shared = next((name for name, dtype in STORED.items() if {dtype} == {found for found, _ in stored}), None)
    if nbytes * (ranks - 1) >= WORTH_A_WORD and shared is not None:
        yield (
            f"warning: each of {ranks} ranks casts the weights to {request.dtype}, {nbytes / 1e9:.1f} GB of its own; "
            f"with --dtype {shared} they share one copy"
        )


WARNING = "warning: "
FAR_ABOVE_NATIVE = 4


def notes_of(
    flags: PictureFlags,
    request: Request,
    facts: ModelFacts,
    cards: Cards,
    *,
    prompts: Iterable[str],
    gpus: int,
    ranks: int,
) -> tuple[str, ...]:
    """All lines, choices first.

    Args:
        prompts: as given.
        gpus, ranks: on this machine.
    """
    stages = request.stages if request.base_res or request.native_size else ()
    choices = (
        *_model(flags, facts, cards, gpus),
        *_window(flags, request, facts),
        *_stages(stages),
        *_prompt(flags, request),
        *_ranks(request, gpus, ranks),
    )
    texts = (*prompts, flags.negative_prompt or "") if facts.is_demo else ()
    warnings = (
        *_unknown_words(texts),
        *_size(stages, facts),
        *casting(request, facts, ranks),
        *_without_effect(flags, request, facts),
    )
    return (*choices, *warnings, *_schedule(flags, request, stages), *_without_cascade(flags, stages))


def _model(flags: PictureFlags, facts: ModelFacts, cards: Cards, gpus: int) -> Iterator[str]:
    if flags.model == "auto":
        with_one = cards.default.partition("/")[2]
        why = f"{gpus} CUDA GPU{'s' * (gpus > 1)} here" if gpus else f"no CUDA GPU here; with one: {with_one}"
        yield f"model: {'demo' if facts.is_demo else facts.location} ({why})"


def _window(flags: PictureFlags, request: Request, facts: ModelFacts) -> Iterator[str]:
    radius = radius_of(request.clear_weights) if request.clear_weights else None
    if flags.window is None and request.clear_weights is None:
        yield f"window: full ({'demo' if facts.is_demo else facts.location} without CLEAR weights)"
    if request.window == "full":
        if request.clear_weights is not None:
            window = f"a window of {radius}" if radius is not None else "a window"
            window += " and down-sampled keys" if (named_down_factor(request.clear_weights) or 1) > 1 else ""
            yield f"{WARNING}the CLEAR weights were distilled for {window}, not for full attention"
        return
    if request.clear_weights is None:
        yield f"{WARNING}window {request.window} without CLEAR weights draws noise unless the model is made for it"
    elif radius is not None and radius != request.window:
        yield f"{WARNING}the CLEAR weights were distilled for a window of {radius}, not {request.window}: expect noise"


def _stages(stages: tuple[Stage, ...]) -> Iterator[str]:
    if len(stages) > 1:
        sizes = " -> ".join(f"{stage.width}x{stage.height}" for stage in stages)
        upper = stages[-1].sampling
        assert isinstance(upper, Upscaling), upper
        yield f"cascade: {sizes} ({upper.steps} steps at strength {upper.strength:g} in each upper stage)"


def _prompt(flags: PictureFlags, request: Request) -> Iterator[str]:
    if request.picture is not None and flags.prompt is None:
        prompt = request.prompts[0]
        yield f"prompt: {shortened(prompt)!r} (from the picture's metadata)" if prompt else "prompt: none"


def _ranks(request: Request, gpus: int, ranks: int) -> Iterator[str]:
    if request.device == "cuda" and ranks > gpus:
        yield f"{ranks} ranks share {gpus} GPU{'s' * (gpus > 1)}: they exchange through host memory"


def _unknown_words(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        unknown = demo.parse(text)[1] if text else []
        if unknown:
            words = shortened(", ".join(map(repr, unknown)))
            yield f"{WARNING}the demo does not know {words}; it draws {demo.DEFAULT_PROMPT!r} and the like"


def _size(stages: tuple[Stage, ...], facts: ModelFacts) -> Iterator[str]:
    side = max(stages[0].size) if stages else 0
    if facts.native_size is not None and side > FAR_ABOVE_NATIVE * facts.native_size:
        yield f"{WARNING}{side} px in one stage is far above the model's {facts.native_size}: expect repetition or blur"


def _without_effect(flags: PictureFlags, request: Request, facts: ModelFacts) -> Iterator[str]:
    if flags.guidance_scale is not None and not facts.takes_guidance:
        yield f"{WARNING}--guidance-scale has no effect: this model was not distilled with guidance"
    if (
        flags.negative_prompt is not None
        and max(request.sampling.true_cfg_scale, request.upscaling.true_cfg_scale) <= 1
    ):
        yield f"{WARNING}--negative-prompt has no effect without --true-cfg-scale above 1"
    if flags.true_cfg_scale is not None and flags.true_cfg_scale > 1 and request.negative_prompt is None:
        yield f"{WARNING}--true-cfg-scale has no effect without --negative-prompt"
    if flags.revision is not None and facts.folder is not None:
        yield f"{WARNING}--revision has no effect: {flags.model} is not a hub id"
    if flags.text_attention is not None and request.world_size == 1 and request.window != "full":
        yield f"{WARNING}--text-attention has no effect on one rank"
    if flags.text_tokens != "auto" and request.world_size == 1:
        yield f"{WARNING}--text-tokens has no effect on one rank"
    if flags.attention_backend != "auto" and request.window == "full":
        yield f"{WARNING}--attention-backend has no effect where the window is full"
    if flags.hoist_modulation and request.device == "cpu":
        yield f"{WARNING}--hoist-modulation has no effect on a CPU: its memory is the host's"
    if request.offload and request.device == "cpu":
        yield f"{WARNING}--offload has no effect on a CPU: its memory is the host's"
    if request.shard_weights and request.world_size == 1:
        yield f"{WARNING}--shard-weights has no effect on one rank"


def _schedule(flags: PictureFlags, request: Request, stages: tuple[Stage, ...]) -> Iterator[str]:
    if request.schedule == "sync":
        if flags.warmup_steps is not None:
            yield f"{WARNING}--warmup-steps has no effect with --schedule sync"
        return
    most = max((stage.sampling.steps for stage in stages), default=request.sampling.steps)
    if request.world_size == 1:
        yield f"{WARNING}--schedule stale has no effect on one rank"
    elif not request.lags_within(most):
        yield f"{WARNING}--schedule stale has no effect: {most} steps are all warm-up; see --warmup-steps"


def _without_cascade(flags: PictureFlags, stages: tuple[Stage, ...]) -> Iterator[str]:
    """Warnings for flags of the upper stages where there are no such stages."""
    if any(isinstance(stage.sampling, Upscaling) for stage in stages):
        return
    given = {
        "--base-res": flags.base_res,
        "--strength": flags.strength,
        "--upscale-steps": flags.upscale_steps,
        "--ntk-factor": flags.ntk_factor,
        "--save-stages": flags.save_stages or None,
    }
    for name, value in given.items():
        if value is not None:
            yield f"{WARNING}{name} has no effect: this size is drawn in one stage"
