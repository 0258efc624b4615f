"""What a user asks for. A mistake that the request alone shows is a Refusal here, before anything is loaded."""

import difflib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Window = int | Literal["full"]
TextAttention = Literal["average", "exact"]

FLUX_DEV = "black-forest-labs/FLUX.1-dev"
FLUX_SCHNELL = "black-forest-labs/FLUX.1-schnell"
CLEAR_REPOSITORY = "Huage001/CLEAR"

TEXT_ATTENTION: tuple[TextAttention, ...] = get_args(TextAttention)
SCHEDULES = ("sync",)
ATTENTION_BACKENDS = ("auto", "reference", "tiled", "flex")
DTYPES = ("auto", "bfloat16", "float16", "float32")
DEVICES = ("auto", "cpu", "cuda")
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")

WHOLE_NUMBERS = {
    "res": (16, 16_384),
    "height": (16, 32_768),
    "width": (16, 32_768),
    "steps": (1, 1_000),
    "max_sequence_length": (1, 512),
    "num_images": (1, 256),
    "nproc": (1, 1_024),
    "seed": (0, 2**63 - 1),
}
"""From and to, both allowed."""
REAL_NUMBERS = {"guidance_scale": (0.0, 100.0), "true_cfg_scale": (1.0, 100.0)}
RADII = (1, 8_192)
MOST_PIXELS = 16_384**2
LONGEST_SHOWN = 80
"""Characters of a value that a message repeats."""


class Refusal(ValueError):
    """The request is wrong: the rule, the value given and the nearest valid value, on one line."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """One `clear-dist generate`, as given; None: not given, and a default is chosen that fits the model.

    Raises:
        Refusal: a number is out of its range, a word is not one of the choices, or two flags contradict each other.
    """

    prompt: str | None = None
    prompts: Path | None = None
    """A file with one prompt a line."""
    negative_prompt: str | None = None
    num_images: int = 1
    model: str = "auto"
    revision: str | None = None
    clear_weights: str = "auto"
    res: int | None = None
    """Pixels; height and width."""
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    max_sequence_length: int | None = None
    seed: int | None = None
    window: str | None = None
    """Radius in tokens, or `full`."""
    text_attention: TextAttention | None = None
    schedule: str = "sync"
    attention_backend: str = "auto"
    dtype: str = "auto"
    device: str = "auto"
    nproc: int | None = None
    output: Path = Path("clear-dist.png")
    latents_out: Path | None = None
    report: Path | None = None
    traceback: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            _check_encoding(name, value)
        for name, (least, most) in WHOLE_NUMBERS.items():
            check_whole_number(f"--{flag(name)}", getattr(self, name), least, most)
        for name, (low, high) in REAL_NUMBERS.items():
            _check_real_number(f"--{flag(name)}", getattr(self, name), low, high)
        _check_choice("--schedule", self.schedule, SCHEDULES)
        _check_choice("--attention-backend", self.attention_backend, ATTENTION_BACKENDS)
        _check_choice("--dtype", self.dtype, DTYPES)
        _check_choice("--device", self.device, DEVICES)
        if self.text_attention is not None:
            _check_choice("--text-attention", self.text_attention, TEXT_ATTENTION)
        _radius(self.window)
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.prompt is not None and self.prompts is not None:
            raise Refusal("either a prompt or --prompts can be given, got both; leave one out")
        if self.res is not None and (self.height is not None or self.width is not None):
            given = "--height" if self.height is not None else "--width"
            raise Refusal(f"--res is both height and width, got {given} too; leave one out")

    @property
    def radius(self) -> Window | None:
        """The window as a number of tokens, `full`, or None where none was given."""
        return _radius(self.window)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A checked request with everything chosen that can be known before the model is loaded.

    None: the loaded model decides (a hub model's native size and window), or rank 0 draws it (the seed).
    """

    prompts: tuple[str, ...]
    negative_prompt: str | None
    num_images: int
    """Of each prompt."""
    model: str
    """A folder, or a hub id."""
    revision: str | None
    clear_weights: str | None
    """A file, or a hub file as `owner/name:file`."""
    height: int | None
    """Pixels, as width."""
    width: int | None
    steps: int
    guidance_scale: float
    true_cfg_scale: float
    max_sequence_length: int
    seed: int | None
    window: Window
    text_attention: TextAttention | None
    schedule: str
    attention_backend: str
    dtype: str
    device: str
    world_size: int
    output: Path
    latents_out: Path | None
    report: Path | None

    @property
    def from_folder(self) -> bool:
        return os.path.isdir(self.model)


def flag(name: str) -> str:
    """A field's name as the command line spells it."""
    return name.replace("_", "-")


def nearest_word(word: str, choices: Sequence[str]) -> str:
    """The choice that was probably meant; the first one where none resembles it."""
    return next(iter(difflib.get_close_matches(word, choices, n=1, cutoff=0.4)), choices[0])


def shortened(text: str) -> str:
    """`text`, its end left out where it is too long to be repeated in a message."""
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 3]}..."


def check_whole_number(name: str, value: int | None, least: int, most: int) -> None:
    """Raises a Refusal for a value outside [least, most]; None passes."""
    if value is not None and not least <= value <= most:
        nearest = min(max(value, least), most)
        raise Refusal(f"{name} must be from {least} to {most}, got {value}; nearest: {nearest}")


def no_number(name: str, text: str) -> Refusal:
    """The Refusal for `text` as the value of the field `name`, which takes a number."""
    whole = name in WHOLE_NUMBERS
    least, most = (WHOLE_NUMBERS if whole else REAL_NUMBERS)[name]
    try:
        nearest = min(max(float(text), least), most)
    except ValueError:
        nearest = least
    nearest = nearest if math.isfinite(nearest) else least
    kind, shown = ("whole number", str(round(nearest))) if whole else ("number", f"{nearest:g}")
    bounds = f"{least} to {most}" if whole else f"{least:g} to {most:g}"
    return Refusal(f"--{flag(name)} must be a {kind} from {bounds}, got {shortened(text)!r}; nearest: {shown}")


def _radius(window: str | None) -> Window | None:
    """Raises a Refusal for a window that is neither a radius nor `full`."""
    if window is None or window == "full":
        return "full" if window else None
    if not window.removeprefix("-").isdecimal() or not window.isascii():
        raise Refusal(f"--window must be a radius in tokens, or full, got {shortened(window)!r}; nearest: 8 or full")
    if len(window) > LONGEST_SHOWN:  # Python converts no more than some thousand digits
        least, most = RADII
        nearest = least if window.startswith("-") else most
        raise Refusal(f"--window must be from {least} to {most}, got {shortened(window)}; nearest: {nearest}")
    check_whole_number("--window", int(window), *RADII)
    return int(window)


def _check_encoding(name: str, value: object) -> None:
    """Raises a Refusal for words or file names of bytes that are not UTF-8: no tokenizer, nor metadata, takes them."""
    text = str(value)
    if not isinstance(value, str | Path) or text.isprintable():
        return
    kept = text.encode(errors="ignore").decode()
    if kept != text:
        label = "the prompt" if name == "prompt" else f"--{flag(name)}"
        raise Refusal(f"{label} must be UTF-8, got {shortened(text)!r}; nearest: {shortened(kept)!r}")


def _check_real_number(name: str, value: float | None, low: float, high: float) -> None:
    if value is None or low <= value <= high:
        return
    nearest = low if math.isnan(value) else min(max(value, low), high)
    raise Refusal(f"{name} must be a number from {low:g} to {high:g}, got {value}; nearest: {nearest:g}")


def _check_choice(name: str, word: str, choices: Sequence[str]) -> None:
    if word not in choices:
        raise Refusal(
            f"{name} must be one of {', '.join(choices)}, got {shortened(word)!r}; "
            f"nearest: {nearest_word(word, choices)}"
        )
