"""What to tell the user, a line each: choices made for them, and flags that will have no effect."""

from collections.abc import Iterable, Iterator

from clear_dist import demo
from clear_dist.clear_checkpoint import radius_of
from clear_dist.config import GenerateConfig, Request, shortened
from clear_dist.preflight.model import ModelFacts

WARNING = "warning: "
FAR_ABOVE_NATIVE = 4


def of(
    config: GenerateConfig, request: Request, facts: ModelFacts, *, prompts: Iterable[str], gpus: int, ranks: int
) -> tuple[str, ...]:
    """All lines, choices first.

    Args:
        prompts: as given.
        gpus, ranks: on this machine.
    """
    choices = (*_model(config, facts, gpus), *_window(config, request, facts), *_ranks(request, gpus, ranks))
    texts = (*prompts, config.negative_prompt or "") if facts.is_demo else ()
    return (*choices, *_unknown_words(texts), *_without_effect(config, request, facts))


def _model(config: GenerateConfig, facts: ModelFacts, gpus: int) -> Iterator[str]:
    if config.model == "auto":
        why = f"{gpus} CUDA GPU{'s' * (gpus > 1)} here" if gpus else "no CUDA GPU here; with one: FLUX.1-dev"
        yield f"model: {'demo' if facts.is_demo else facts.location} ({why})"


def _window(config: GenerateConfig, request: Request, facts: ModelFacts) -> Iterator[str]:
    radius = radius_of(request.clear_weights) if request.clear_weights else None
    if config.window is None and request.clear_weights is None:
        yield f"window: full ({'demo' if facts.is_demo else facts.location} without CLEAR weights)"
    if request.window == "full":
        if request.clear_weights is not None:
            window = f"a window of {radius}" if radius is not None else "a window"
            yield f"{WARNING}the CLEAR weights were distilled for {window}, not for full attention"
        return
    if request.clear_weights is None:
        yield f"{WARNING}window {request.window} without CLEAR weights draws noise unless the model is made for it"
    elif radius is not None and radius != request.window:
        yield f"{WARNING}the CLEAR weights were distilled for a window of {radius}, not {request.window}: expect noise"


def _ranks(request: Request, gpus: int, ranks: int) -> Iterator[str]:
    if request.device == "cuda" and ranks > gpus:
        yield f"{ranks} ranks share {gpus} GPU{'s' * (gpus > 1)}: they exchange through host memory"


def _unknown_words(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        unknown = demo.parse(text)[1] if text else []
        if unknown:
            words = shortened(", ".join(map(repr, unknown)))
            yield f"{WARNING}the demo does not know {words}; it draws {demo.DEFAULT_PROMPT!r} and the like"


def _without_effect(config: GenerateConfig, request: Request, facts: ModelFacts) -> Iterator[str]:
    if config.guidance_scale is not None and not facts.takes_guidance:
        yield f"{WARNING}--guidance-scale has no effect: this model was not distilled with guidance"
    if config.negative_prompt is not None and request.true_cfg_scale <= 1:
        yield f"{WARNING}--negative-prompt has no effect without --true-cfg-scale above 1"
    if config.true_cfg_scale is not None and config.true_cfg_scale > 1 and request.negative_prompt is None:
        yield f"{WARNING}--true-cfg-scale has no effect without --negative-prompt"
    side = max(request.height or 0, request.width or 0)
    if facts.native_size is not None and side > FAR_ABOVE_NATIVE * facts.native_size:
        yield f"{WARNING}{side} px in one stage is far above the model's {facts.native_size}: expect repetition or blur"
    if config.revision is not None and facts.folder is not None:
        yield f"{WARNING}--revision has no effect: {config.model} is no hub id"
    if config.text_attention is not None and request.world_size == 1 and request.window != "full":
        yield f"{WARNING}--text-attention has no effect on one rank"
    if config.attention_backend != "auto" and request.window == "full":
        yield f"{WARNING}--attention-backend has no effect where the window is full"
