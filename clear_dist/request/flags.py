"""Flags of the command line: a record for each command, whose fields its parameters are made from.

Mistakes in the flags alone are refused here. None: not given; a value that fits the model is chosen.
"""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from clear_dist.options import CUT, JOIN_SECONDS, MODEL, Flags, Refusal, check_encoding, flag, shortened
from clear_dist.refining import REFINEMENTS
from clear_dist.request.beside_controlnets import check_beside_controlnets
from clear_dist.request.hardware import GPUS, LINKS
from clear_dist.request.model_flags import DEVICES, ModelFlags, RunFlags
from clear_dist.request.picture_flags import PICTURES, ControlFlags, InputFlags
from clear_dist.request.resume_flags import ResumeFlags, check_resume
from clear_dist.stages import NTK

DRAWN, LARGE, WRITTEN = "What to draw", "Above the native size", "What is written"
PANELS = (DRAWN, PICTURES, LARGE, MODEL, CUT, WRITTEN, None)
SIDES, SQUARES, STEPS = (16, 32_768), (16, 16_384), (1, 1_000)
STDOUT = "-"
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")
UPSCALED = "-upscaled"
"""End of the names of enlarged pictures, where none is given."""
READ_ENDINGS = (*PICTURE_ENDINGS, ".gif", ".bmp", ".avif", ".jp2")
"""Endings of pictures to start from, in a folder."""


def read_res(text: str) -> int | tuple[int, int]:
    """Side of a square, or width and height; raises ValueError where the text is neither."""
    width, times, height = text.lower().partition("x")
    return (int(width), int(height)) if times else int(width)


@dataclass(frozen=True, kw_only=True)
class Kept(RunFlags, ResumeFlags):
    seed: int | None = flag(
        None, "of the noise, on any number of ranks (drawn and reported)", DRAWN, bounds=(0, 2**63 - 1), planned=False
    )
    base_res: int | None = flag(
        None, "side of a square as large as the first stage (the native size)", LARGE, bounds=SQUARES
    )
    save_stages: bool = flag(False, "write the lower stages' pictures too", LARGE, planned=False)
    data_ranks: int = flag(
        1, "groups of ranks that draw different pictures of --prompts and --num-images at the same time (1)", CUT,
        bounds=(1, 1_024),
    )  # fmt: skip
    keep_text_encoder: bool = flag(
        False, "encode each prompt when its turn comes, not all before the rest loads", MODEL
    )
    output: Path = flag(
        Path("clear-dist.png"), "picture: png, jpg, webp or tiff; several are numbered (clear-dist.png)", WRITTEN,
        metavar="FILE", planned=False,
    )  # fmt: skip
    preview_every: int | None = flag(
        None, "write a small preview beside the output every so many steps", WRITTEN, metavar="STEPS", bounds=STEPS,
        planned=False,
    )  # fmt: skip
    metadata: bool = flag(
        True, "no prompt, seed and settings in the picture", WRITTEN, names=(" /--no-metadata",), planned=False
    )
    latents_out: Path | None = flag(
        None, "latents as the pipeline has them, safetensors", WRITTEN, metavar="FILE", planned=False
    )
    report: Path | None = flag(None, "times, memory and communication, JSON", WRITTEN, metavar="FILE", planned=False)
    quiet: bool = flag(False, "no progress: no display, and in a log no lines for stages and every 30 s", planned=False)
    profile: Path | None = flag(
        None, "what is in flight when, in the last 3 steps: json or json.gz, one for each rank", WRITTEN,
        metavar="FILE", planned=False,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PictureFlags(Kept, ControlFlags, ModelFlags):
    """Flags of every command that draws; raises a Refusal for values out of bounds or contradictory flags."""

    res: int | None = flag(
        None, "height and width in pixels, or WIDTHxHEIGHT (the model's native size)", DRAWN, bounds=SQUARES,
        read=read_res,
    )  # fmt: skip
    height: int | None = flag(None, "pixels", DRAWN, bounds=SIDES)
    width: int | None = flag(None, "pixels", DRAWN, bounds=SIDES)
    guidance_scale: float | None = flag(
        None, "distilled guidance (3.5; above the native size 7.5)", DRAWN, bounds=(0.0, 100.0), planned=False
    )
    negative_prompt: str | None = flag(None, "what to keep out; with --true-cfg-scale", DRAWN)
    true_cfg_scale: float | None = flag(
        None,
        "classifier-free guidance; above 1: on (as the model asks; demo 3, at its native size)",
        DRAWN,
        bounds=(1.0, 100.0),
    )
    max_sequence_length: int | None = flag(None, "text tokens (as many as the model asks for)", DRAWN, bounds=(1, 512))
    strength: float | None = flag(
        None,
        "share of noise that enlarged pictures get (0.7; demo 0.3); with --image, that one (0.6)",
        LARGE,
        bounds=(0.001, 1.0),
    )
    refine: str | None = flag(
        None,
        "how enlarged pictures are refined: from their noise, or from noise alone led by them (sdedit)",
        LARGE,
        choices=tuple(REFINEMENTS),
    )
    upscale_steps: int | None = flag(
        None, "steps of each upper stage (the model's steps x strength)", LARGE, bounds=STEPS
    )
    ntk_factor: float | None = flag(
        None, "of the rotary embedding's base (10)", LARGE, bounds=(1.0, 1_000.0), planned=False
    )
    ntk: str | None = flag(
        None, "clipped: no frequency below the stock one / sqrt(tokens / native tokens) (plain)", LARGE, choices=NTK,
        planned=False,
    )  # fmt: skip
    lora: list[str] | None = flag(
        None,
        "a LoRA with its weight (1) and stages, the upper ones or from so many pixels on (all); once for each",
        MODEL,
        metavar="FILE|FOLDER|HUB-ID|NAME[:WEIGHT][@STAGES]",
    )

    def __post_init__(self) -> None:
        written = {"latents_out": self.latents_out is not None, "profile": self.profile is not None}
        check_resume(resume=self.resume, no_metadata=not self.metadata, **written)
        if self.res is not None and (self.height is not None or self.width is not None):
            given = "--height" if self.height is not None else "--width"
            raise Refusal(f"--res is both height and width, got {given} too; leave one out")
        if isinstance(self.res, tuple):
            for name, value in zip(("width", "height", "res"), (*self.res, None), strict=True):
                object.__setattr__(self, name, value)  # frozen from here on
        super().__post_init__()
        if self.controlnet is not None:
            check_beside_controlnets(self)


@dataclass(frozen=True, kw_only=True)
class GenerateFlags(PictureFlags, InputFlags):
    prompt: str | None = flag(None, "what the picture shows; quote it", is_argument=True, planned=False)
    prompts: Path | None = flag(
        None,
        "one prompt a line, or .jsonl: prompt, negative_prompt, seed, size, output; the model is loaded once",
        DRAWN,
        metavar="FILE",
        planned=False,
    )
    steps: int | None = flag(
        None,
        "denoising steps (as many as the model asks for)",
        DRAWN,
        names=("--steps", "--num-inference-steps"),
        bounds=STEPS,
    )
    num_images: int = flag(1, "pictures of each prompt (1)", DRAWN, bounds=(1, 256))
    cascade: str = flag(
        "auto", "auto: draw at the native size, then enlarge and refine; off (auto)", LARGE, choices=("auto", "off")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_prompts(self)
        if self.controlnet is not None and self.control_image is None and not self.only_planned:
            raise Refusal(f"--controlnet needs a picture, got {self.controlnet} alone; nearest: --control-image FILE")
        if self.controlnet is not None and self.image is not None:
            raise Refusal("either --controlnet or --image can be given, got both; leave one out")


@dataclass(frozen=True, kw_only=True)
class UpscaleFlags(PictureFlags):
    images: list[str] = flag(
        ..., "pictures or folders to make larger, and what they show (the prompt that clear-dist wrote into each)",
        is_argument=True, metavar="IMAGE... [PROMPT]",
    )  # fmt: skip
    prompts: Path | None = flag(
        None,
        "one prompt a line, as many as pictures, or .jsonl without sizes; the model is loaded once",
        DRAWN,
        metavar="FILE",
    )
    background: str | None = flag(None, "below transparent parts: a name or #rrggbb (white)", DRAWN, metavar="COLOUR")
    res: int | None = flag(
        None, "the longer side in pixels, or WIDTHxHEIGHT (twice the picture's)", DRAWN, bounds=SQUARES, read=read_res
    )
    height: int | None = flag(None, "pixels; with both, the picture is cropped to their shape", DRAWN, bounds=SIDES)
    width: int | None = flag(None, "pixels; with both, the picture is cropped to their shape", DRAWN, bounds=SIDES)
    output: Path | None = flag(  # type: ignore[assignment]  # named after the image where it is not given
        None, "picture: png, jpg, webp or tiff; several are numbered (IMAGE-upscaled.png, in this folder)", WRITTEN,
        metavar="FILE",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for word in self.words:
            check_encoding("--prompt", word)
        if len(self.words) > 1 or not self.files:
            shown = ", ".join(repr(shortened(word)) for word in self.words)
            raise Refusal(f"upscale takes files and at most one prompt, got {shown}; quote the prompt")
        _check_prompts(self)

    @property
    def files(self) -> list[Path]:
        """Pictures and folders: what exists, or is named like a picture."""
        words = self.words
        return [Path(word) for word in self.images if word not in words]

    @cached_property
    def words(self) -> list[str]:
        """What is neither: the prompt."""
        return [word for word in self.images if not os.path.exists(word) and not word.lower().endswith(READ_ENDINGS)]

    @property
    def prompt(self) -> str | None:
        return next(iter(self.words), None)


def _check_prompts(flags: GenerateFlags | UpscaleFlags) -> None:
    if flags.prompt is not None and flags.prompts is not None:
        raise Refusal("either a prompt or --prompts can be given, got both; leave one out")


@dataclass(frozen=True, kw_only=True)
class PlanFlags(GenerateFlags):
    """A `generate` on GPUs that need not be here."""

    only_planned = True
    gpu: str = flag(
        "auto", "kind (those of this machine; else H100, for the demo the CPU)", CUT,
        metavar="|".join(("auto", "cpu", *GPUS)),
    )  # fmt: skip
    gpu_memory: float | None = flag(
        None, "GB of each GPU: with --gpu another size of that kind; alone any GPU, without times", CUT,
        metavar="GB", bounds=(1.0, 1_000.0),
    )  # fmt: skip
    link: str = flag("auto", "between ranks (what such GPUs usually have)", CUT, metavar="|".join(("auto", *LINKS)))
    nproc: int | None = flag(None, "ranks (the GPUs of this machine, or 1)", CUT, bounds=(1, 1_024))
    sweep: bool = flag(False, "a table over 1 to 64 ranks", WRITTEN)
    json: bool = flag(False, "for programs", WRITTEN)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpu_memory is not None and self.gpu.lower() == "cpu":
            raise Refusal("--gpu-memory is for GPUs, got --gpu cpu too; leave one out")


@dataclass(frozen=True, kw_only=True)
class VerifyFlags(Flags):
    nproc: int | None = flag(
        None, "ranks to start here (visible GPUs; 2 on CPU); not under torchrun", bounds=(1, 1_024)
    )
    join_timeout: int = flag(JOIN_SECONDS, "seconds that ranks wait for missing ones (300)", bounds=(1, 86_400))
    device: str = flag("auto", "auto: CUDA where it is", choices=DEVICES)
    share_gpus: bool = flag(False, "ranks may share a GPU while others are idle", planned=False)
    json: str | None = flag(None, "versions, devices, every figure; - is stdout", metavar="FILE|-")
    traceback: bool = flag(False, "if a rank fails, show where")
