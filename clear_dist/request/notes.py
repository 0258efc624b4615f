"""Lines for the user: choices made for them, and flags that will have no effect."""

import math
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from clear_dist import demo
from clear_dist.cards.card import Cards
from clear_dist.cards.clear import named_down_factor, radius_of
from clear_dist.cards.folder import ModelFacts
from clear_dist.cards.headers import read_tensors
from clear_dist.cards.single_file import weight_files
from clear_dist.options import Options, shortened, spelled
from clear_dist.pictures import keeps_alpha
from clear_dist.request.controlnet import stretching
from clear_dist.request.devices import FoundGpu
from clear_dist.request.flags import GenerateFlags, PictureFlags, UpscaleFlags
from clear_dist.request.pictures import is_listed
from clear_dist.request.request import Picture, Request
from clear_dist.stages import ImageToImage, Upscaling

STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""dtypes by their names in safetensors files."""
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
WORTH_A_WORD = 1_000_000_000
"""Bytes."""
DISTILL = "; clear-dist distill makes some" if find_spec("clear_dist.commands.distill") else ""
"""The way to weights, where it is there."""
WARNING = "warning: "
FAR_ABOVE_NATIVE = 4


def notes_of(
    flags: PictureFlags,
    request: Request,
    facts: ModelFacts,
    cards: Cards,
    *,
    prompts: Iterable[str],
    gpus: Sequence[FoundGpu],
    ranks: int,
) -> tuple[str, ...]:
    """All lines, choices first; `prompts` as given, `gpus` and `ranks` of this machine."""
    return (
        *_choices(flags, request, facts, cards, len(gpus)),
        *_kinds(gpus[:ranks]),
        *_warnings(request, facts, (*prompts, flags.negative_prompt or ""), ranks),
        *stretching(request),
        *_without_effect(flags, request, facts),
    )


def sharing(transport: str) -> Iterator[str]:
    """A line where ranks, which have met, cannot send from GPU to GPU."""
    if transport == "host":
        yield "ranks share GPUs, or torch has no NCCL: their messages go through host memory, which is slow"


def _kinds(gpus: Sequence[FoundGpu]) -> Iterator[str]:
    names = list(dict.fromkeys(gpu.name for gpu in gpus))
    if len(names) > 1:
        yield (
            f"{WARNING}ranks are on {' and '.join(names)}: the slowest and the smallest decide; CUDA_VISIBLE_DEVICES "
            "chooses"
        )


def _choices(flags: PictureFlags, request: Request, facts: ModelFacts, cards: Cards, gpus: int) -> Iterator[str]:
    name = "demo" if facts.is_demo else facts.name if facts.files else facts.location
    if flags.model == "auto":
        with_one = cards.default.partition("/")[2]
        why = f"{gpus} CUDA GPU{'s' * (gpus > 1)} here" if gpus else f"no CUDA GPU here; with one: {with_one}"
        yield f"model: {name} ({why})"
    if facts.files:
        files = ", ".join(f"{part} {source.file.name}" for part, source in facts.files.items())
        yield f"files: {files}; the rest: {facts.location}"
    if flags.dtype == "auto" and request.dtype == "float16":
        yield "dtype: float16 (GPUs of compute capability below 8.0 lack bfloat16)"
    if flags.window is None and request.clear_weights is None:
        yield f"window: full ({name} without CLEAR weights{DISTILL})"
    yield from _window(request)
    if len(request.stages) > 1:
        sizes = " -> ".join(f"{stage.width}x{stage.height}" for stage in request.stages)
        upper = request.upscaling
        how = f"at strength {upper.strength:g}" if upper.refinement == "sdedit" else f"of {upper.refinement}"
        later = f", then {upper.later_steps}" if upper.later_steps and len(request.stages) > 2 else ""
        yield f"cascade: {sizes} ({upper.steps} step{'s' * (upper.steps > 1)}{later} {how} in each upper stage)"
    if isinstance(flags, UpscaleFlags):
        yield from _pictures(flags, request)
    if isinstance(request.sampling, ImageToImage):
        yield from _first_picture(request, request.sampling)
    if request.looks:
        yield f"image: {shortened(request.pictures[0].file.name)} is looked at, not drawn over"
    if isinstance(flags, GenerateFlags) and flags.prompt is None and flags.prompts is None:
        yield f"prompt: {shortened(request.prompts[0])!r} (none was given)"
    yield from averaging(request, request.ranks // (2 if request.guidance_ranks == 2 else 1))


def _pictures(flags: UpscaleFlags, request: Request) -> Iterator[str]:
    count, told = len(request.pictures), sum(map(bool, request.prompts))
    if count > 1:
        yield f"pictures: {count}, the largest {request.width}x{request.height}"
    if flags.prompt is None and flags.prompts is None:
        prompt = request.prompts[0]
        if count > 1:
            yield f"prompts: {told} of {count} pictures have one in their metadata"
        else:
            yield f"prompt: {shortened(prompt)!r} (from the picture's metadata)" if prompt else "prompt: none"
    for folder in filter(Path.is_dir, flags.files):
        if left_out := sum(not is_listed(file) and not file.name.startswith(".") for file in folder.iterdir()):
            yield f"{folder}: {left_out} files or folders in it are left out: by their names no pictures, or results"
    for picture in request.pictures:
        yield from _of_picture(picture, picture.output or request.output, below="--background")


def _first_picture(request: Request, sampling: ImageToImage) -> Iterator[str]:
    picture, steps = request.pictures[0], f"{sampling.steps} of {sampling.schedule} steps"
    (height, width), stage = picture.size, request.stages[0]
    sizes = f"its middle {width}x{height} at {stage.width}x{stage.height}"
    yield f"image: {shortened(picture.file.name)}, {sizes}: {steps} at strength {sampling.strength:g}"
    yield from _of_picture(picture, request.output, below="white")


def _of_picture(picture: Picture, output: Path, *, below: str) -> Iterator[str]:
    name = shortened(picture.file.name)
    if picture.has_alpha:
        fate = "kept apart, and put back" if keeps_alpha(output) else f"laid on {below}: {output} has none"
        yield f"{name}: its transparency is {fate}"
    for note in picture.notes:
        yield f"{WARNING}{name}: {note}"


def averaging(options: Options, ranks: int) -> Iterator[str]:
    """A line where Eq. 7 of the paper draws on several ranks."""
    if options.text_attention == "average" and ranks > 1:
        yield (
            f"text attention: average (the paper's Eq. 7): {ranks} ranks draw another picture than one, and may lose "
            "small things; --text-attention exact draws the same"
        )


def _window(request: Request) -> Iterator[str]:
    """A warning for a window that the weights were not distilled for."""
    window, checkpoint = request.window, request.clear_weights
    if checkpoint is None:
        if window != "full":
            yield f"{WARNING}window {window} without CLEAR weights draws noise unless the model is made for it"
        return
    radius = radius_of(checkpoint)
    trained = "a window" if radius is None else f"a window of {radius}"
    if window == "full":
        trained += " and down-sampled keys" if (named_down_factor(checkpoint) or 1) > 1 else ""
        yield f"{WARNING}the CLEAR weights were distilled for {trained}, not for full attention"
    elif radius not in (None, window):
        yield f"{WARNING}the CLEAR weights were distilled for {trained}, not {window}: expect noise"


def _warnings(request: Request, facts: ModelFacts, texts: Iterable[str], ranks: int) -> Iterator[str]:
    for text in texts if facts.is_demo else ():
        if unknown := demo.parse(text)[1] if text else []:
            words = shortened(", ".join(map(repr, unknown)))
            yield f"{WARNING}the demo does not know {words}; it draws {demo.DEFAULT_PROMPT!r} and the like"
    side = max(request.stages[0].size) if request.stages else 0
    if facts.native_size is not None and side > FAR_ABOVE_NATIVE * facts.native_size:
        yield f"{WARNING}{side} px in one stage is far above the model's {facts.native_size}: expect repetition or blur"
    largest = max((max(stage.size) for stage in request.stages), default=0)
    if facts.interpolated_above is not None and largest > (most := facts.interpolated_above * facts.token_size):
        beyond = f"{largest} px is beyond the model's {most} px of positions"
        yield f"{WARNING}{beyond}: they are interpolated, which is untried"
    # Where ranks on CPUs each cast weights that they could share.
    if request.device != "cpu" or ranks == 1 or facts.folder is None:
        return
    assert facts.card is not None, "known with the folder"
    stored = [
        kind
        for file in weight_files(facts.folder, facts.card, "transformer", facts.files)
        for kind in read_tensors(file).values()
    ]
    cast = sum(math.prod(shape) for dtype, shape in stored if dtype != STORED[request.dtype])
    nbytes = cast * ITEMSIZE[request.dtype]
    shared = next((name for name, dtype in STORED.items() if {dtype} == {found for found, _ in stored}), None)
    if nbytes * (ranks - 1) >= WORTH_A_WORD and shared is not None:
        yield (
            f"{WARNING}each of {ranks} ranks casts the weights to {request.dtype}, {nbytes / 1e9:.1f} GB of its own; "
            f"with --dtype {shared} they share one copy"
        )


def _without_effect(flags: PictureFlags, request: Request, facts: ModelFacts) -> Iterator[str]:
    """Warnings for flags that change nothing here."""
    alone, on_cpu, is_full = request.ranks == 1, request.device == "cpu", request.window == "full"
    stages, is_stale = request.stages, request.schedule == "stale"
    steps = max((stage.sampling.steps for stage in stages), default=request.sampling.steps)
    is_guided = max(request.sampling.true_cfg_scale, request.upscaling.true_cfg_scale) > 1
    lacks_prompt = (flags.true_cfg_scale or 1) > 1 and request.negative_prompt is None
    unguidable = flags.guidance_scale is not None and not facts.takes_guidance
    instead = "; nearest: --true-cfg-scale" if facts.sampling.true_cfg_scale > 1 else ""
    absolute = "has no effect: this model has no rotary positions" if not facts.has_rotary_positions else ""
    for applies, line in (
        (unguidable, f"--guidance-scale has no effect: this model was not distilled with guidance{instead}"),
        (absolute and flags.ntk_factor is not None, f"--ntk-factor {absolute}"),
        (absolute and flags.ntk is not None, f"--ntk {absolute}"),
        (flags.negative_prompt is not None and not is_guided,
         "--negative-prompt has no effect" + (" without --true-cfg-scale above 1" if facts.takes_negative_prompts
         else ": this model takes none")),
        (lacks_prompt, "--true-cfg-scale has no effect without --negative-prompt"),
        (flags.revision is not None and facts.folder, f"--revision has no effect: {flags.model} is not a hub id"),
        (flags.text_attention is not None and alone and not is_full, "--text-attention has no effect on one rank"),
        (flags.text_tokens != "auto" and alone, "--text-tokens has no effect on one rank"),
        (flags.attention_backend != "auto" and is_full, "--attention-backend has no effect where the window is full"),
        (flags.hoist_modulation and on_cpu, "--hoist-modulation has no effect on a CPU: its memory is the host's"),
        (flags.offload and on_cpu, "--offload has no effect on a CPU: its memory is the host's"),
        (flags.shard_weights and alone, "--shard-weights has no effect on one rank"),
        (flags.warmup_steps is not None and not is_stale, "--warmup-steps has no effect with --schedule sync"),
        (is_stale and alone, "--schedule stale has no effect on one rank"),
        (is_stale and not alone and not request.lags_within(steps),
         f"--schedule stale has no effect: {steps} steps are all warm-up; see --warmup-steps"),
    ):  # fmt: skip
        if applies:
            yield f"{WARNING}{line}"
    if isinstance(flags, UpscaleFlags) and flags.background and not any(each.has_alpha for each in request.pictures):
        yield f"{WARNING}--background has no effect: nothing here is transparent"
    if not any(isinstance(stage.sampling, Upscaling) for stage in stages):
        for name in ("base_res", "upscale_steps", "ntk_factor", "ntk", "save_stages"):
            if getattr(flags, name):
                yield f"{WARNING}{spelled(name)} has no effect: this size is drawn in one stage"
