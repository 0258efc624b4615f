"""What a user can choose of how a picture is drawn on many ranks: one record, from the command line to the report.

`Options` is what `parallelize` takes, the engine goes by, and `plan` counts. A new choice is a field here, with its
help, its bounds and its rule, and a line where the engine acts on it; the command line is made from these fields.
"""

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from operator import index
from pathlib import Path
from typing import Any, Literal, Self, get_args

Window = int | Literal["full"]
TextAttention = Literal["average", "exact"]
TextTokens = Literal["auto", "replicated", "sharded"]
Schedule = Literal["sync", "stale"]

TEXT_ATTENTION: tuple[TextAttention, ...] = get_args(TextAttention)
TEXT_TOKENS: tuple[TextTokens, ...] = get_args(TextTokens)
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
ATTENTION_BACKENDS = ("auto", "reference", "masked", "tiled", "flex", "flash", "triton")
WARMUP_STEPS = 4
LONGEST_SHOWN = 80
"""Characters of a value that a message repeats."""
MODEL, CUT = "Model", "How it is cut"
"""Panels of the help."""


class Refusal(ValueError):
    """The request is wrong: the rule, the value given and the nearest valid value, on one line."""


@dataclass(frozen=True, kw_only=True)
class Flag:
    """How a field is shown and read on the command line, and what values it takes."""

    help: str
    panel: str | None = None
    choices: tuple[str, ...] = ()
    bounds: tuple[float, float] | None = None
    """From and to, both allowed; whole numbers where both are."""
    metavar: str | None = None
    names: tuple[str, ...] = ()
    """Other spellings; by default the field's own."""
    read: Callable[[str], Any] | None = None
    """Text to value; by default what the field's type says."""
    is_argument: bool = False
    """Whether it stands without a name."""
    planned: bool = True
    """Whether `plan` takes it too."""

    def check(self, name: str, value: Any) -> None:
        """Raises a Refusal where `value` is neither None nor allowed."""
        check_encoding(name, value)
        if value is None:
            return
        if self.choices:
            check_choice(name, value, self.choices)
        if self.bounds is not None and all(isinstance(bound, int) for bound in self.bounds):
            check_whole_number(name, value, *map(int, self.bounds))
        elif self.bounds is not None:
            check_real_number(name, value, *self.bounds)


def flag(default: Any, text: str, panel: str | None = None, **rest: Any) -> Any:
    """A field of a record of flags; `rest` as in `Flag`. Without a default (`...`) it must be given."""
    metadata = {"flag": Flag(help=text, panel=panel, **rest)}
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


def flag_of(each: Field) -> Flag:
    """How a field is shown and checked."""
    return each.metadata["flag"]


def spelled(name: str) -> str:
    """A field's name as the command line has it."""
    return f"--{name.replace('_', '-')}"


def read_window(text: str) -> Window | str:
    """A number where the text is one; else the text, which `Options` refuses unless it is `full`."""
    digits = text[: LONGEST_SHOWN + 1]  # Python converts no more than some thousand
    return int(digits) if text.isascii() and text.removeprefix("-").isdecimal() else text


@dataclass(frozen=True, kw_only=True)
class Flags:
    """A record whose fields are made by `flag`.

    Raises:
        Refusal: a number is out of its bounds, or a word is not one of the choices.
    """

    def __post_init__(self) -> None:
        for each in fields(self):
            if "flag" in each.metadata:
                flag_of(each).check(spelled(each.name), getattr(self, each.name))


@dataclass(frozen=True, kw_only=True)
class Options(Flags):
    """How a transformer is put on stripes. None: chosen from the checkpoint, or the usual value.

    Raises:
        Refusal: a value is out of its bounds, or two contradict each other.
    """

    window: Window | None = flag(
        None, "radius in tokens, or full (the CLEAR weights'; full without)", MODEL, metavar="RADIUS|full",
        read=read_window,
    )  # fmt: skip
    """Radius in tokens of what an image token sees (paper, Sec. 3.2), or `full`."""
    hoist_modulation: bool = flag(
        False, "AdaLN's weights (about a quarter of all) in host memory; no effect on a CPU", MODEL
    )
    compile: bool = flag(
        False, "fuse norms, rotations and gates by torch.compile, which the first step waits for", MODEL
    )
    float8: bool = flag(False, "linear layers of the blocks in float8, for GPUs of Ada's generation and later", MODEL)
    int8: bool = flag(False, "linear layers of the blocks with weights in 8 bits, on any device", MODEL)
    shard_weights: bool = flag(False, "each rank holds a share of every block; the next one's travel meanwhile", MODEL)
    offload: bool = flag(False, "text encoders and VAE in host memory while not in use; no effect on a CPU", MODEL)
    text_attention: TextAttention | None = flag(
        None, "average: the paper's; exact: independent of the ranks (average)", CUT, choices=TEXT_ATTENTION
    )
    """`average`: Eq. 7 of the paper; `exact`: N ranks compute what one computes."""
    text_tokens: TextTokens = flag(
        "auto", "text tokens' linear layers: on all ranks, or a share on each (auto: by size)", CUT,
        choices=TEXT_TOKENS,
    )  # fmt: skip
    schedule: Schedule = flag(
        "sync", "sync: this step's halos; stale: the step before's, for slow links (sync)", CUT, choices=SCHEDULES
    )
    warmup_steps: int | None = flag(
        None, "synchronous steps before --schedule stale sets in (4)", CUT, bounds=(0, 1_000)
    )
    attention_backend: str = flag(
        "auto", "auto: the fastest for the image, as far as measured", CUT, choices=ATTENTION_BACKENDS
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.window)
        if self.window == "full" and self.text_attention == "average":
            raise Refusal("--text-attention must be exact where the window is full, got average; nearest: exact")
        if self.text_tokens == "sharded" and self.schedule == "stale":
            raise Refusal(
                "--text-tokens must be replicated where the schedule is stale, got sharded; nearest: replicated"
            )
        if self.float8 and self.int8:
            raise Refusal("either --float8 or --int8 can be given, got both; leave one out")

    @property
    def radius(self) -> int | None:
        """The window in tokens; None: full attention."""
        return None if self.window in (None, "full") else index(self.window)  # type: ignore[arg-type]

    def settled(self, window: Window) -> Self:
        """With everything chosen that was left open.

        Args:
            window: for where none was given.
        """
        chosen = window if self.window is None else self.window
        default: TextAttention = "exact" if chosen == "full" else "average"
        return replace(
            self,
            window=chosen,
            text_attention=self.text_attention or default,
            warmup_steps=WARMUP_STEPS if self.warmup_steps is None else index(self.warmup_steps),
        )


def check_window(window: object) -> None:
    """Raises a Refusal for a window that is neither None, nor a radius, nor `full`."""
    if window is None or window == "full":
        return
    if isinstance(window, bool | str) or not hasattr(window, "__index__"):
        shown = shortened(str(window))
        raise Refusal(f"--window must be a radius in tokens, or full, got {shown!r}; nearest: 8 or full")
    check_whole_number("--window", index(window), 1, 8_192)


def nearest_word(word: str, choices: Sequence[str]) -> str:
    """The choice that was probably meant; the first one where none resembles it."""
    begun = [choice for choice in choices if word and choice.startswith(word)]
    return next(iter(begun or difflib.get_close_matches(word, choices, n=1, cutoff=0.4)), choices[0])


def shortened(text: str) -> str:
    """`text`, its end left out where it is too long to be repeated in a message."""
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 3]}..."


def check_choice(name: str, word: str, choices: Sequence[str]) -> None:
    """Raises a Refusal for a word that is not one of `choices`."""
    if word not in choices:
        shown = shortened(str(word))
        nearest = nearest_word(str(word), choices)
        raise Refusal(f"{name} must be one of {', '.join(choices)}, got {shown!r}; nearest: {nearest}")


def check_whole_number(name: str, value: Any, least: int, most: int) -> None:
    """Raises a Refusal for what is no whole number from `least` to `most`."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise Refusal(f"{name} must be a whole number from {least} to {most}, got {value!r}; nearest: {least}")
    if not least <= value <= most:
        nearest = min(max(value, least), most)
        raise Refusal(f"{name} must be from {least} to {most}, got {shortened(str(value))}; nearest: {nearest}")


def check_real_number(name: str, value: float, low: float, high: float) -> None:
    """Raises a Refusal for a number outside of [low, high], or none."""
    if not low <= value <= high:
        nearest = low if math.isnan(value) else min(max(value, low), high)
        raise Refusal(f"{name} must be a number from {low:g} to {high:g}, got {value}; nearest: {nearest:g}")


def check_encoding(name: str, value: object) -> None:
    """Raises a Refusal for words or file names of bytes that are not UTF-8: no tokenizer, nor metadata, takes them."""
    text = str(value)
    if not isinstance(value, str | Path) or text.isprintable():
        return
    kept = text.encode(errors="ignore").decode()
    if kept != text:
        label = "the prompt" if name == "--prompt" else name
        raise Refusal(f"{label} must be UTF-8, got {shortened(text)!r}; nearest: {shortened(kept)!r}")
