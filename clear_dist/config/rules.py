"""What a request may contain: ranges, choices, and the Refusal that names the rule, the value and the nearest one."""

import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

Window = int | Literal["full"]
TextAttention = Literal["average", "exact"]
TextTokens = Literal["auto", "replicated", "sharded"]
Schedule = Literal["sync", "stale"]

TEXT_ATTENTION: tuple[TextAttention, ...] = get_args(TextAttention)
TEXT_TOKENS: tuple[TextTokens, ...] = get_args(TextTokens)
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
WARMUP_STEPS = 4
CASCADE = ("auto", "off")
ATTENTION_BACKENDS = ("auto", "reference", "masked", "tiled", "flex", "flash", "triton")
DTYPES = ("auto", "bfloat16", "float16", "float32")
DEVICES = ("auto", "cpu", "cuda")
CHOICES: dict[str, tuple[str, ...]] = {
    "text_attention": TEXT_ATTENTION,
    "text_tokens": TEXT_TOKENS,
    "schedule": SCHEDULES,
    "cascade": CASCADE,
    "attention_backend": ATTENTION_BACKENDS,
    "dtype": DTYPES,
    "device": DEVICES,
}
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")
PROFILE_ENDINGS = (".json", ".json.gz")

WHOLE_NUMBERS = {
    "res": (16, 16_384),
    "height": (16, 32_768),
    "width": (16, 32_768),
    "base_res": (16, 16_384),
    "steps": (1, 1_000),
    "upscale_steps": (1, 1_000),
    "max_sequence_length": (1, 512),
    "num_images": (1, 256),
    "nproc": (1, 1_024),
    "seed": (0, 2**63 - 1),
    "preview_every": (1, 1_000),
    "warmup_steps": (0, 1_000),
}
"""From and to, both allowed."""
REAL_NUMBERS = {
    "guidance_scale": (0.0, 100.0),
    "true_cfg_scale": (1.0, 100.0),
    "strength": (0.001, 1.0),
    "ntk_factor": (1.0, 1_000.0),
}
RADII = (1, 8_192)
MOST_PIXELS = 16_384**2
LONGEST_SHOWN = 80
"""Characters of a value that a message repeats."""


class Refusal(ValueError):
    """The request is wrong: the rule, the value given and the nearest valid value, on one line."""


def flag(name: str) -> str:
    """A field's name as the command line spells it."""
    return name.replace("_", "-")


def nearest_word(word: str, choices: Sequence[str]) -> str:
    """The choice that was probably meant; the first one where none resembles it."""
    begun = [choice for choice in choices if word and choice.startswith(word)]
    return next(iter(begun or difflib.get_close_matches(word, choices, n=1, cutoff=0.4)), choices[0])


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


def radius(window: str | None) -> Window | None:
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


def check_encoding(name: str, value: object) -> None:
    """Raises a Refusal for words or file names of bytes that are not UTF-8: no tokenizer, nor metadata, takes them."""
    text = str(value)
    if not isinstance(value, str | Path) or text.isprintable():
        return
    kept = text.encode(errors="ignore").decode()
    if kept != text:
        label = "the prompt" if name == "prompt" else f"--{flag(name)}"
        raise Refusal(f"{label} must be UTF-8, got {shortened(text)!r}; nearest: {shortened(kept)!r}")


def check_real_number(name: str, value: float | None, low: float, high: float) -> None:
    if value is None or low <= value <= high:
        return
    nearest = low if math.isnan(value) else min(max(value, low), high)
    raise Refusal(f"{name} must be a number from {low:g} to {high:g}, got {value}; nearest: {nearest:g}")


def check_choice(name: str, word: str, choices: Sequence[str]) -> None:
    if word not in choices:
        raise Refusal(
            f"{name} must be one of {', '.join(choices)}, got {shortened(word)!r}; "
            f"nearest: {nearest_word(word, choices)}"
        )


def check_text_tokens(name: str, text_tokens: str, schedule: str) -> None:
    """Raises a Refusal where text tokens are to be sharded in the stale schedule."""
    if text_tokens == "sharded" and schedule == "stale":
        raise Refusal(f"{name} must be replicated where the schedule is stale, got sharded; nearest: replicated")
