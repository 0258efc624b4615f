"""What can be checked, and chosen, before weights are loaded: no torch here."""

import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

from clear_dist import demo
from clear_dist.clear_checkpoint import radius_of
from clear_dist.comm.env import Place
from clear_dist.config import MOST_PIXELS, GenerateConfig, Refusal, Request, Window, shortened
from clear_dist.geometry import cut_in_stripes
from clear_dist.preflight import clear_weights, devices, model, notes, outputs
from clear_dist.preflight.model import ModelFacts

DEFAULT_PROMPT = "a lighthouse on a cliff at dusk, its light over a calm sea"
LONGEST_SIDE = {".webp": 16_383, ".jpg": 65_500, ".jpeg": 65_500}
"""Pixels; the other formats take more than anyone asks for."""


def check(config: GenerateConfig, place: Place) -> tuple[Request, tuple[str, ...]]:
    """The request with everything chosen that can be known by now, and what to tell the user about it.

    Raises:
        Refusal: see the checks; the first that fails is told.
    """
    gpus = devices.count_gpus() if config.device != "cpu" else 0
    if config.device == "cuda" and not gpus:
        raise Refusal("--device cuda needs a CUDA GPU, and there is none here; nearest: cpu")
    device = "cuda" if gpus else "cpu"
    facts = model.find(config.model, has_cuda=bool(gpus))
    height, width = _size(config, facts)
    checkpoint = clear_weights.find(config.clear_weights, config.radius, facts)
    window = _window(config, checkpoint)
    prompts = _prompts(config, facts, place)
    request = Request(
        prompts=tuple(_understood(prompt, facts) or "" for prompt in prompts),
        negative_prompt=_understood(_given(config.negative_prompt, facts.negative_prompt), facts),
        num_images=config.num_images,
        model=facts.location,
        revision=config.revision,
        clear_weights=checkpoint,
        height=height,
        width=width,
        steps=config.steps or facts.steps,
        guidance_scale=_given(config.guidance_scale, facts.guidance_scale),
        true_cfg_scale=_given(config.true_cfg_scale, facts.true_cfg_scale),
        max_sequence_length=config.max_sequence_length or facts.max_sequence_length,
        seed=config.seed,
        window=window,
        text_attention=config.text_attention,
        schedule=config.schedule,
        attention_backend=config.attention_backend,
        dtype=("bfloat16" if device == "cuda" else "float32") if config.dtype == "auto" else config.dtype,
        device=device,
        world_size=_world_size(config, place, gpus),
        output=config.output,
        latents_out=config.latents_out,
        report=config.report,
    )
    _check_text_attention(request)
    _check_size(request, facts)
    ranks = place.local_world_size if place.launcher else request.world_size
    return request, notes.of(config, request, facts, prompts=prompts, gpus=gpus, ranks=ranks)


def located(request: Request, folder: Path, checkpoint: str | None) -> Request:
    """A hub model's request once its files are in `folder`: what could not be checked before is checked now.

    Raises:
        Refusal: as `check`.
    """
    facts = model.of_folder(folder)
    native = facts.native_size
    settled = replace(
        request,
        model=str(folder),
        clear_weights=clear_weights.find(checkpoint or "none", request.window, facts),
        height=request.height or native,
        width=request.width or native,
    )
    _check_size(settled, facts)
    return settled


def _prompts(config: GenerateConfig, facts: ModelFacts, place: Place) -> tuple[str, ...]:
    """As given. A pipe can be read once only: not here and in the notes, and not by each of torchrun's ranks."""
    if config.prompts is None:
        default = demo.DEFAULT_PROMPT if facts.is_demo else DEFAULT_PROMPT
        return (default if config.prompt is None else config.prompt,)
    try:
        if place.world_size > 1 and stat.S_ISFIFO(config.prompts.stat().st_mode):
            raise Refusal(f"--prompts must be a file under torchrun, got the pipe {config.prompts}; nearest: --nproc")
        lines = config.prompts.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why, shown = getattr(error, "strerror", None) or "not UTF-8", shortened(str(config.prompts))
        raise Refusal(f"--prompts must be a text file, one prompt a line, got {shown} ({why})") from error
    given = tuple(line.strip() for line in lines if line.strip())
    if not given:
        raise Refusal(f"--prompts must hold at least one prompt, got the empty file {config.prompts}")
    return given


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value


def _understood(prompt: str | None, facts: ModelFacts) -> str | None:
    """The demo has a small language of its own: its canonical spelling is what the encoders know."""
    return demo.parse(prompt)[0] if prompt is not None and facts.is_demo else prompt


def _window(config: GenerateConfig, checkpoint: str | None) -> Window:
    if config.radius is not None:
        return config.radius
    if checkpoint is None:
        return "full"
    radius = radius_of(checkpoint)
    if radius is None:
        raise Refusal(
            f"--window must be given where the checkpoint's name does not tell it, got {checkpoint}; "
            "nearest: clear_local_<radius>.safetensors"
        )
    return radius


def _size(config: GenerateConfig, facts: ModelFacts) -> tuple[int | None, int | None]:
    """Height and width in pixels; None: a hub model's native size."""
    for name, size in (("res", config.res), ("height", config.height), ("width", config.width)):
        if size is not None and size % facts.token_size:
            below = size // facts.token_size * facts.token_size
            nearest = " or ".join(str(near) for near in (below, below + facts.token_size) if near)
            raise Refusal(
                f"--{name} must be a multiple of {facts.token_size} pixels (one token), got {size}; nearest: {nearest}"
            )
    height, width = config.height or config.res, config.width or config.res
    return height or facts.native_size, width or facts.native_size


def _world_size(config: GenerateConfig, place: Place, gpus: int) -> int:
    if place.launcher is None:
        return config.nproc or gpus or 1
    if config.nproc not in (None, place.world_size):
        raise Refusal(
            f"--nproc must be what torchrun started, or left out, got {config.nproc}; nearest: {place.world_size}"
        )
    return place.world_size


def _check_text_attention(request: Request) -> None:
    if request.window == "full" and request.text_attention == "average":
        raise Refusal("--text-attention must be exact where the window is full, got average; nearest: exact")


def _check_size(request: Request, facts: ModelFacts) -> None:
    """Checks that need both sides in pixels; a hub model without a size has them once it is located."""
    if request.height is None or request.width is None:
        return
    try:
        cut_in_stripes(request.height // facts.token_size, request.world_size)
    except ValueError as error:
        raise Refusal(f"--height {request.height}: {error}") from error
    if request.height * request.width > MOST_PIXELS:
        nearest = f"{MOST_PIXELS // request.height // facts.token_size * facts.token_size} wide"
        raise Refusal(
            f"a picture has at most {MOST_PIXELS} pixels, got {request.width} x {request.height}; nearest: {nearest}"
        )
    side, most = max(request.height, request.width), LONGEST_SIDE.get(request.output.suffix.lower())
    if most is not None and side > most:
        raise Refusal(
            f"a {request.output.suffix} picture is at most {most} pixels wide and high, got {side}; nearest: .png"
        )
    outputs.check(
        request.output,
        request.latents_out,
        request.report,
        pixels=request.height * request.width,
        pictures=len(request.prompts) * request.num_images,
    )
