"""A request settled: checks and choices before weights are loaded, without torch.

Those that need the files of a hub's model follow in `located`, once they are here.
"""

from collections.abc import Iterable
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from clear_dist import demo
from clear_dist.cards.card import Cards
from clear_dist.cards.clear import radius_of
from clear_dist.cards.folder import ModelFacts, read_folder
from clear_dist.geometry import cut_in_stripes
from clear_dist.launch.env import Place
from clear_dist.options import Refusal, Window, spelled
from clear_dist.request import devices
from clear_dist.request.axes import check_axes, check_groups
from clear_dist.request.clear_weights import down_factor, find_checkpoint
from clear_dist.request.controlnet import compare_control, find_control
from clear_dist.request.flags import Kept, PictureFlags
from clear_dist.request.hardware import BFLOAT16_CAPABILITY, FLOAT8_CAPABILITY
from clear_dist.request.lora import check_stages, compare_loras, find_loras
from clear_dist.request.notes import notes_of
from clear_dist.request.outputs import check_outputs
from clear_dist.request.request import Lora, Request
from clear_dist.request.single_file import find
from clear_dist.request.start import Start, check_units, find_start, upscaling
from clear_dist.stages import ImageToImage, check_refining

LONGEST_SIDE = {".webp": 16_383, ".jpg": 65_500, ".jpeg": 65_500}
"""Pixels; the other formats take more than anyone asks for."""
MOST_PIXELS = 16_384**2


def settle(flags: PictureFlags, place: Place, cards: Cards) -> tuple[Request, ModelFacts, tuple[str, ...]]:
    """The request, its model, and lines for the user; raises a Refusal for the first check that fails."""
    gpus = devices.gpus_for(flags.device)
    used = gpus[: place.local_world_size if place.launcher else flags.nproc]
    device = "cuda" if gpus else "cpu"
    if flags.compile and (missing := devices.missing_compiler(device)):
        raise Refusal(f"--compile needs {missing} on {device}, got none; nearest: without --compile")
    if flags.float8 and not gpus:
        raise Refusal("--float8 needs a CUDA GPU of compute capability 8.9, got cpu; nearest: without --float8")
    if flags.float8:
        _require_capability(used, FLOAT8_CAPABILITY, "--float8", nearest="without --float8")
    request, facts, begin = choose(flags, place, cards, device=device, gpus=used)
    for package in () if facts.card is None else facts.card.needs:
        if find_spec(package) is None:
            rule = f"{facts.name} needs the package {package}, which is not installed"
            raise Refusal(f"{rule}; nearest: pip install {package}")
    check_groups(request)
    if request.height is not None and request.width is not None:
        check_outputs(request)
    ranks = place.local_world_size if place.launcher else request.world_size
    return request, facts, notes_of(flags, request, facts, cards, prompts=begin.prompts, gpus=gpus, ranks=ranks)


def choose(
    flags: PictureFlags, place: Place, cards: Cards, *, device: str, gpus: tuple[devices.FoundGpu, ...]
) -> tuple[Request, ModelFacts, Start]:
    """`settle` for any machine: the request, its model and its start; by default a rank on each of `gpus`."""
    facts = find(flags, cards, has_cuda=device == "cuda")
    _check_for_model(flags, facts)
    checkpoint = find_checkpoint(flags.clear_weights, flags.window, facts, cards, flags.down_factor)
    window = _window(flags, checkpoint)
    factor = down_factor(window, checkpoint)
    begin = find_start(flags, facts, place, unit=facts.token_size * factor)
    settled = flags.settled(window)
    kept: dict[str, Any] = {each.name: getattr(settled, each.name) for each in fields(Kept)}
    negative = facts.negative_prompt if flags.negative_prompt is None else flags.negative_prompt
    negatives = [negative if line.negative_prompt is None else line.negative_prompt for line in begin.lines]
    pairs = zip(begin.lines, negatives, strict=True)
    lines = tuple(replace(line, negative_prompt=understood(own, facts)) for line, own in pairs)
    negative = next((x for x in (negative, *negatives) if x is not None), None)  # asked: whether any picture has one
    prompts = tuple(understood(prompt, facts) or "" for prompt in begin.prompts)
    request = Request(
        negative_prompt=understood(negative, facts),
        model=facts.location,
        model_name=facts.name,
        clear_weights=checkpoint,
        files=facts.files,
        loras=find_loras(flags.lora, facts, cards, flags, in_cascade=begin.cascade),
        control=find_control(flags, facts, cards),
        native_size=facts.native_size,
        token_size=facts.token_size,
        down_factor=factor,
        upscaling=upscaling(flags, begin.sampling, facts),
        max_sequence_length=flags.max_sequence_length or facts.max_sequence_length,
        dtype=_dtype(flags.dtype, device, gpus),
        device=device,
        world_size=devices.world_size(flags.nproc, place, otherwise=len(gpus) or 1),
        **kept | vars(begin) | {"prompts": prompts, "lines": lines},
    )
    check_axes(request)
    _check_sizes(request, facts)
    _check_refining(flags, request)
    check_stages(request)
    return request, facts, begin


def located(
    request: Request,
    folder: Path,
    checkpoint: str | None,
    loras: Iterable[Lora],
    cards: Cards,
    controlnet: Path | None = None,
) -> Request:
    """The request once all files are here; raises as `settle`.

    It keeps the names that `loras`, and the ControlNet in the folder `controlnet`, were asked for by.
    """
    facts = read_folder(folder, cards, request.files)
    native = facts.native_size
    found = find_checkpoint(checkpoint or "none", request.window, facts, cards)
    settled = replace(
        request,
        model=str(folder),
        clear_weights=found,
        down_factor=down_factor(request.window, found),
        height=request.height or native,
        width=request.width or native,
        native_size=native,
        token_size=facts.token_size,
    )
    for name in ("height", "width", "base_res"):  # a token is as large as its VAE says
        check_units(spelled(name), getattr(settled, name), settled.unit, facts.token_size)
    compare_loras(loras, facts, cards, request)
    if request.control is not None:
        compare_control(request.control, controlnet, facts, cards)
    _check_sizes(settled, facts)
    check_stages(settled)
    check_outputs(settled)
    return settled


def _check_for_model(flags: PictureFlags, facts: ModelFacts) -> None:
    """Raises a Refusal for flags that are for other models."""
    if (flags.true_cfg_scale or 1) > 1 and not facts.takes_negative_prompts:
        got = f"got {flags.true_cfg_scale:g} for {facts.name}, whose guidance is distilled"
        raise Refusal(f"--true-cfg-scale must be 1 where a model takes no negative prompts, {got}; nearest: 1")
    if flags.hoist_modulation and facts.card is not None and not facts.card.hoists_modulation:
        raise Refusal(
            f"--hoist-modulation is for models whose blocks have large modulation of their own, got {facts.name}; "
            "nearest: without --hoist-modulation"
        )
    for name in ("ntk", "ntk_factor"):
        value, flag = getattr(flags, name), spelled(name)
        if facts.has_yarn and value is not None:
            got = f"got {value} for {facts.name}, whose positions go on by themselves"
            raise Refusal(f"{flag} is for models without YaRN, {got}; nearest: without {flag}")


def _check_refining(flags: PictureFlags, request: Request) -> None:
    if flags.strength is not None and request.stages and not any(each.starts_from_picture for each in request.stages):
        got = f"got {flags.strength:g} for {request.width} x {request.height} px from noise"
        raise Refusal(
            f"--strength is for a picture to start from, or a size above the native one, {got}; nearest: none"
        )
    for index in request.differing:
        try:
            check_refining(request.alone(index).stages, flags.refine)
        except ValueError as error:
            raise Refusal(f"--refine: {error}") from error


def understood(prompt: str | None, facts: ModelFacts) -> str | None:
    """The prompt as the model's encoders know it: the demo has a small language of its own."""
    return demo.parse(prompt)[0] if prompt is not None and facts.is_demo else prompt


def _dtype(word: str, device: str, gpus: tuple[devices.FoundGpu, ...]) -> str:
    """What `auto` stands for on these GPUs, or the dtype asked for; raises a Refusal where they lack it."""
    if word == "bfloat16":
        _require_capability(gpus, BFLOAT16_CAPABILITY, "--dtype bfloat16", nearest="float16")
    if word != "auto" or device == "cpu":
        return "float32" if word == "auto" else word
    return "float16" if any(gpu.capability < BFLOAT16_CAPABILITY for gpu in gpus) else "bfloat16"


def _require_capability(gpus: tuple[devices.FoundGpu, ...], least: float, flag: str, *, nearest: str) -> None:
    for gpu in gpus:
        if gpu.capability < least:
            rule = f"{flag} needs GPUs of compute capability {least} or higher"
            raise Refusal(f"{rule}, got {gpu.capability} ({gpu.name}); nearest: {nearest}")


def _window(flags: PictureFlags, checkpoint: str | None) -> Window:
    if flags.window is not None:
        return flags.window
    if checkpoint is None:
        return "full"
    radius = radius_of(checkpoint)
    if radius is None:
        raise Refusal(
            f"--window must be given where the checkpoint's name does not tell it, got {checkpoint}; "
            "nearest: clear_local_<radius>.safetensors"
        )
    return radius


def _check_sizes(request: Request, facts: ModelFacts) -> None:
    if request.pictures and facts.card is not None and not facts.card.starts_from_pictures:
        _check_looking(request, facts)
    for index in request.differing:
        one = request.alone(index)
        _check_positions(one, facts)
        _check_size(one)


def _check_looking(request: Request, facts: ModelFacts) -> None:
    """Raises a Refusal where a model that only looks at pictures is to start from one."""
    assert facts.card is not None, "known with the model"
    if request.pictures[0].mask is not None:
        raise Refusal(f"--mask is for models with image to image, got {facts.name}; nearest: without --mask")
    if isinstance(request.sampling, ImageToImage) or (not request.enlarges and facts.card.reference_area is None):
        got = f"got {request.pictures[0].file.name} for {facts.name}"
        raise Refusal(f"--image is for models that take one, known by their names or files, {got}; nearest: none")


def _check_positions(request: Request, facts: ModelFacts) -> None:
    """Raises a Refusal for a side beyond the model's table of positions, which nothing continues."""
    if facts.positions is None or request.height is None or request.width is None:
        return
    size = request.height, request.width
    most = [tokens * facts.token_size // request.unit * request.unit for tokens in facts.positions]
    if size[0] > most[0] or size[1] > most[1]:
        nearest = f"{min(size[1], most[1])} x {min(size[0], most[0])}"
        raise Refusal(
            f"{facts.name} has positions for pictures up to {most[1]} x {most[0]} px, got {size[1]} x {size[0]}; "
            f"nearest: {nearest}"
        )


def _check_size(request: Request) -> None:
    if request.height is None or request.width is None:
        return
    height, width = request.size
    try:
        request.striping(request.size, request.ranks)
        cut_in_stripes(height // request.token_size, request.ranks)  # the VAE's
    except ValueError as error:
        raise Refusal(f"{width} x {height} px: {error}") from error
    if height * width > MOST_PIXELS:
        nearest = f"{MOST_PIXELS // height // request.token_size * request.token_size} wide"
        raise Refusal(f"a picture has at most {MOST_PIXELS} pixels, got {width} x {height}; nearest: {nearest}")
    side, base, ending = max(height, width), request.base_res, request.output.suffix
    if base is not None and base > side:
        raise Refusal(f"--base-res must be at most the final {side} px, got {base}; nearest: {side}")
    if side > (longest := LONGEST_SIDE.get(ending.lower(), side)):
        raise Refusal(f"a {ending} picture is at most {longest} pixels wide and high, got {side}; nearest: .png")
    if request.shard_weights and request.stages:
        _check_shards(request)


def _check_shards(request: Request) -> None:
    smallest = min(request.stages, key=lambda stage: request.most_ranks(stage.size))
    most = request.most_ranks(smallest.size)
    if most < request.ranks:
        raise Refusal(
            f"--shard-weights needs all ranks in every stage, and {smallest.width} x {smallest.height} pixels are for "
            f"{most} at most, got {request.ranks} ranks; nearest: --nproc {most * request.data_ranks}"
        )
