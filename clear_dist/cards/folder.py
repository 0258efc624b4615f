"""What a model is, before it is loaded: its geometry and its defaults, from its folder's files or from its name."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clear_dist import demo
from clear_dist.cards.clear import require_same_tensors
from clear_dist.cards.headers import positive_number, read_component, read_json, whole_number, whole_numbers
from clear_dist.families.flux.card import FLUX_DEV, FLUX_SCHNELL, FluxShape
from clear_dist.options import Refusal, nearest_word, shortened
from clear_dist.stages import Sampling, Upscaling

PIPELINE, TRANSFORMER, SCHEDULER = "FluxPipeline", "FluxTransformer2DModel", "FlowMatchEulerDiscreteScheduler"
WEIGHT_STEMS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
OTHER_PARTS = ("tokenizer", "tokenizer_2", "scheduler")
HUB_ID = re.compile(r"(?=.{3,96}$)[\w.-]+/[\w.-]+", re.ASCII)
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")
PACKING = 2
"""FLUX packs 2x2 latents in a token."""
VAE_CHANNELS, LATENT_CHANNELS, NATIVE_SIZE = (128, 256, 512, 512), 16, 1024
"""FLUX's own, where a configuration tells nothing."""
CLIP_TOKENS = 77
SCHEDULE = {"shift": 3.0, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
"""What decides the noise of each step, and FLUX.1-dev's values."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What checks and defaults need to know of a model."""

    location: str
    """A folder, or a hub id."""
    is_demo: bool = False
    folder: Path | None = None
    token_size: int = 16
    """Pixels along the side of a token."""
    native_size: int | None = None
    """Pixels; None: known once a hub model is loaded."""
    flux: FluxShape | None = None
    takes_guidance: bool = True
    sampling: Sampling = field(default_factory=Sampling)
    upscaling: Upscaling = field(default_factory=Upscaling)
    """Its steps: those that the model's `sampling` asks for."""
    negative_prompt: str | None = None
    max_sequence_length: int = 512


def find(model: str, *, has_cuda: bool) -> ModelFacts:
    """The model that `--model` names.

    Raises:
        Refusal: a folder is missing, empty, damaged or of another architecture; no name of a model.
    """
    if model == "auto":
        model = FLUX_DEV if has_cuda else "demo"
    if model == "demo":
        return _demo()
    if os.path.exists(model) or model.startswith((".", "/", "~")) or not HUB_ID.fullmatch(model):
        return of_folder(Path(model).expanduser())
    schnell = model == FLUX_SCHNELL
    native_size = 1024 if model in (FLUX_DEV, FLUX_SCHNELL) else None
    return ModelFacts(location=model, native_size=native_size, **_defaults(guided=not schnell, few_steps=schnell))


def of_folder(folder: Path) -> ModelFacts:
    """A folder in diffusers' layout, its weights' headers compared with its configurations.

    Raises:
        Refusal: see `find`.
    """
    _check_folder(folder)
    _check_pipeline(folder, read_json(folder / "model_index.json"))
    _check_tokenizers(folder)
    configuration, vae_file = folder / "transformer" / "config.json", folder / "vae" / "config.json"
    flux, vae = FluxShape.of(read_json(configuration), configuration), read_json(vae_file)
    scheduler_file = folder / "scheduler" / "scheduler_config.json"
    scheduler = read_json(scheduler_file)
    for name, default in SCHEDULE.items():
        positive_number(scheduler, name, default, scheduler_file)
    token_size = PACKING * 2 ** (len(whole_numbers(vae, "block_out_channels", VAE_CHANNELS, vae_file)) - 1)
    latent_channels = whole_number(vae, "latent_channels", LATENT_CHANNELS, vae_file)
    native_size = whole_number(vae, "sample_size", NATIVE_SIZE, vae_file)
    if flux.in_channels != latent_channels * PACKING**2:
        raise Refusal(
            f"the transformer must take {latent_channels * PACKING**2} channels, 4 per channel of the VAE, "
            f"got {flux.in_channels} in {folder}: models that take another picture are not supported; "
            f"nearest: {FLUX_DEV}"
        )
    for part, stem in WEIGHT_STEMS.items():
        shapes = read_component(folder / part, stem)
        if part == "transformer":
            require_same_tensors(flux.tensors(), shapes, folder / part)
    few_steps = not flux.guidance_embeds and not scheduler.get("use_dynamic_shifting", False)
    return ModelFacts(
        location=str(folder),
        folder=folder,
        token_size=token_size,
        native_size=max(native_size // token_size, 1) * token_size,
        flux=flux,
        **_defaults(guided=flux.guidance_embeds, few_steps=few_steps),
    )


def _demo() -> ModelFacts:
    facts = of_folder(demo.WEIGHTS)
    return replace(
        facts,
        is_demo=True,
        sampling=Sampling(steps=demo.DEFAULT_STEPS, guidance_scale=0.0, true_cfg_scale=demo.DEFAULT_TRUE_CFG_SCALE),
        upscaling=Upscaling(guidance_scale=0.0, strength=demo.DEFAULT_STRENGTH),
        max_sequence_length=demo.DEFAULT_MAX_SEQUENCE_LENGTH,
        negative_prompt="",
    )


def _defaults(*, guided: bool, few_steps: bool) -> dict[str, Any]:
    """FLUX.1-schnell is distilled to 4 steps and takes no guidance; FLUX.1-dev takes guidance."""
    if few_steps:
        sampling, upscaling = Sampling(steps=4, guidance_scale=0.0), Upscaling(guidance_scale=0.0)
        return {"takes_guidance": False, "sampling": sampling, "upscaling": upscaling, "max_sequence_length": 256}
    return {"takes_guidance": guided}


def _check_folder(folder: Path) -> None:
    if not os.path.exists(folder):  # a Path raises for a name that is too long
        nearest = nearest_word(str(folder), ("demo", FLUX_DEV, FLUX_SCHNELL))
        raise Refusal(
            f"--model must be auto, demo, a hub id such as {FLUX_DEV}, or a folder; "
            f"there is no {shortened(str(folder))}; nearest: {nearest}"
        )
    if not folder.is_dir():
        raise Refusal(f"--model must be a folder in diffusers' layout, got the file {folder}; nearest: {folder.parent}")
    if not any(folder.iterdir()):
        raise Refusal(f"--model must be a folder in diffusers' layout, got the empty folder {folder}; nearest: demo")


def _check_pipeline(folder: Path, index: Mapping[str, Any]) -> None:
    name = index.get("_class_name")
    if name != PIPELINE:
        raise Refusal(f"--model must be a {PIPELINE}, got {name} in {folder}; nearest: {FLUX_DEV}")
    for part in (*WEIGHT_STEMS, *OTHER_PARTS):
        if not (folder / part).is_dir():
            raise Refusal(f"a {PIPELINE} must have the folder {part}, and {folder} has none; download it again")
    kind = read_json(folder / "transformer" / "config.json").get("_class_name")
    if kind != TRANSFORMER:
        raise Refusal(f"the transformer must be a {TRANSFORMER}, got {kind} in {folder}; nearest: {FLUX_DEV}")
    listed = index.get("scheduler")  # the class that diffusers loads
    kinds = {listed[1] if isinstance(listed, list) and len(listed) == 2 else None}
    kinds.add(read_json(folder / "scheduler" / "scheduler_config.json").get("_class_name"))
    if kinds != {SCHEDULER}:
        got = ", ".join(sorted(map(str, kinds - {SCHEDULER})))
        raise Refusal(f"the scheduler must be a {SCHEDULER}, got {got} in {folder}; nearest: {FLUX_DEV}")


def _check_tokenizers(folder: Path) -> None:
    for tokenizer in (folder / "tokenizer", folder / "tokenizer_2"):
        files = {file.name: file for file in tokenizer.iterdir()}
        if not files.keys() & set(VOCABULARIES):
            raise Refusal(f"{tokenizer} must hold one of {', '.join(VOCABULARIES)}, and has none; download it again")
        for file in files.values():
            if file.suffix == ".json":
                read_json(file)
    settings = folder / "tokenizer" / "tokenizer_config.json"
    whole_number(read_json(settings), "model_max_length", CLIP_TOKENS, settings)
