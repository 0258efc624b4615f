"""Options of drawing a picture on many ranks: one record, from the command line to the report.

`Options` is taken by `parallelize`, obeyed by the engine and counted by `plan`. A new option is a field here, with its
help, bounds and rule, and a line where the engine acts on it; the command line is made from these fields.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from operator import index
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self, get_args

Window = int | Literal["full"]
TextAttention = Literal["average", "exact"]
TextTokens = Literal["auto", "replicated", "sharded"]
Schedule = Literal["sync", "stale"]
CudaGraphs = Literal["auto", "off"]
GuidanceRanks = Literal["auto", 1, 2]
Lines = Literal["auto", "rows", "columns"]
WindowShape = Literal["circle", "square"]

ATTENTION_BACKENDS = ("auto", "reference", "masked", "tiled", "flex", "flash", "triton")
WARMUP_STEPS = 4
MOST_REPLAYED = 8_192
"""Tokens up to which steps are replayed as CUDA graphs. A projection: with 12 billion parameters, a token takes 24 us
of an H100 at 990 TFLOP/s, and a step's 1,100 to 1,700 launches 6 to 9 ms of the host, 23 in float8, which rule below
1,000 tokens. Eight times as many, for hosts that are slower or have else to do: a graph costs only its capture."""
FEWEST_REPLAYED = 4
"""Steps to come, or a capture, which takes the host as long as a step, does not pay."""
DROPPING = ("masked", "tiled")
"""Backends that keep few masks, and may give one's memory away while a graph still reads it."""
JOIN_SECONDS = 300
"""How long ranks wait for missing ones."""
STEP_CACHES = MappingProxyType({"first-block": (0.0, 2.0), "taylor": (2, 10)})
"""Bounds of each step cache's number: a relative change (2: to the opposite), or steps between computed ones."""
LONGEST_SHOWN = 80
"""Most characters of a value that a message repeats."""
MODEL, CUT = "Model", "How it is cut"
"""Panels of the help."""


class Refusal(ValueError):
    """A wrong request: the rule, the value given and the nearest valid value, on one line."""


@dataclass(frozen=True, kw_only=True)
class Flag:
    """Help, spelling and values of a field on the command line."""

    help: str
    panel: str | None = None
    choices: tuple[str, ...] = ()
    bounds: tuple[float, float] | None = None
    """Smallest and largest value; whole numbers where both bounds are."""
    metavar: str | None = None
    names: tuple[str, ...] = ()
    """Other spellings than the field's own."""
    read: Callable[[str], Any] | None = None
    """Text to value; by default according to the field's type."""
    is_argument: bool = False
    """Whether it is positional."""
    planned: bool = True
    """Whether `plan` takes it too."""
    beside_controlnets: bool = True
    """Whether it can be chosen where there are ControlNets, which are run with it."""

    def check(self, name: str, value: Any) -> None:
        """Raises a Refusal where `value` is not allowed."""
        check_encoding(name, value)
        if self.choices:
            check_choice(name, value, self.choices)
        if self.bounds is not None and all(isinstance(bound, int) for bound in self.bounds):
            check_whole_number(name, value, *map(int, self.bounds))
        elif self.bounds is not None and not self.bounds[0] <= value <= self.bounds[1]:  # NaN too
            low, high = self.bounds
            nearest = min(max(low, value), high)  # of NaN the low one
            raise Refusal(f"{name} must be a number from {low:g} to {high:g}, got {value}; nearest: {nearest:g}")


def flag(default: Any, text: str, panel: str | None = None, **rest: Any) -> Any:
    """Field of a record of flags, `rest` as in `Flag`; required where the default is `...`."""
    metadata = {"flag": Flag(help=text, panel=panel, **rest)}
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


def flag_of(each: Field) -> Flag:
    return each.metadata["flag"]


def spelled(name: str) -> str:
    """Flag of a field: `--text-attention` for `text_attention`."""
    return f"--{name.replace('_', '-')}"


def read_window(text: str) -> Window | str:
    """Radius where the text is a number; else the text, which `Options` refuses unless it is `full`."""
    digits = text[: LONGEST_SHOWN + 1]  # Python converts only some thousand digits
    return int(digits) if text.isascii() and text.removeprefix("-").isdecimal() else text


def read_guidance_ranks(text: str) -> int | str:
    """Number where the text is one of the two; else the text, which `Options` refuses unless it is `auto`."""
    return int(text) if text in ("1", "2") else text


@dataclass(frozen=True, kw_only=True)
class Flags:
    """A record whose fields are made by `flag`; raises a Refusal for values out of bounds or not among the choices."""

    only_planned = False
    """Whether the command takes `planned` flags only; the other fields keep their defaults."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if "flag" in each.metadata and (value is not None or each.default is not None):
                flag_of(each).check(spelled(each.name), value)


@dataclass(frozen=True, kw_only=True)
class Options(Flags):
    """Settings of a transformer on stripes (None: the checkpoint's or usual one); a Refusal where two contradict."""

    window: Window | None = flag(
        None, "radius in tokens, or full (the CLEAR weights'; full without)", MODEL, metavar="RADIUS|full",
        read=read_window,
    )  # fmt: skip
    """Radius in tokens that an image token sees (paper, Sec. 3.2), or `full`."""
    window_shape: WindowShape = flag(
        "circle", "circle: CLEAR's; square: neighbourhood attention's, for weights distilled to it (circle)", MODEL,
        choices=get_args(WindowShape),
    )  # fmt: skip
    hoist_modulation: bool = flag(
        False, "AdaLN's weights (about a quarter of all) in host memory; no effect on a CPU", MODEL
    )
    compile: bool = flag(
        False, "torch.compile for what no kernel of ours fuses: for float8, int8, LoRA, CPUs, GPUs before Ampere", MODEL
    )
    float8: bool = flag(False, "linear layers of the blocks in float8, for GPUs of Ada's generation and later", MODEL)
    int8: bool = flag(False, "linear layers of the blocks with weights in 8 bits, on any device", MODEL)
    shard_weights: bool = flag(False, "each rank holds a share of every block; the next one's travel meanwhile", MODEL)
    offload: bool = flag(False, "text encoders and VAE in host memory while not in use; no effect on a CPU", MODEL)
    text_attention: TextAttention | None = flag(
        None, "average: the paper's; exact: independent of the ranks (average)", CUT, choices=get_args(TextAttention)
    )
    """`average`: Eq. 7 of the paper; `exact`: N ranks compute what one computes."""
    cut: Lines = flag(
        "auto", "stripes of rows or of columns (auto: of those that send fewer bytes)", CUT, choices=get_args(Lines)
    )
    text_tokens: TextTokens = flag(
        "auto", "text tokens' linear layers: on all ranks, or a share on each (auto: by size)", CUT,
        choices=get_args(TextTokens),
    )  # fmt: skip
    guidance_ranks: GuidanceRanks = flag(
        "auto", "2: each half of the ranks takes a pass of classifier-free guidance (auto: where sooner by the plan)",
        CUT, metavar="1|2|auto", read=read_guidance_ranks,
    )  # fmt: skip
    schedule: Schedule = flag(
        "sync", "sync: this step's halos; stale: the step before's, for slow links (sync)", CUT,
        choices=get_args(Schedule),
    )  # fmt: skip
    warmup_steps: int | None = flag(
        None, "synchronous steps before --schedule stale sets in (4)", CUT, bounds=(0, 1_000)
    )
    cuda_graphs: CudaGraphs = flag(
        "auto", "auto: steps with few tokens go to the GPU as one CUDA graph; no effect on a CPU (auto)", CUT,
        choices=get_args(CudaGraphs),
    )  # fmt: skip
    cache: str | None = flag(
        None, "skip steps: those of little change, or all but each N-th", CUT, metavar="first-block:CHANGE|taylor:N",
        beside_controlnets=False,  # their residuals come between the blocks that are left out
    )  # fmt: skip
    share_gpus: bool = flag(False, "ranks may share a GPU while others are idle", planned=False)
    attention_backend: str = flag(
        "auto", "auto: the fastest for the image, as far as measured", CUT, choices=ATTENTION_BACKENDS
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.window)
        check_choice("--guidance-ranks", self.guidance_ranks, get_args(GuidanceRanks))
        if self.text_tokens == "sharded" and self.schedule == "stale":
            raise Refusal("--text-tokens must be replicated with --schedule stale, got sharded; nearest: replicated")
        if self.step_cache[0] == "taylor" and self.schedule == "stale":
            raise Refusal("--schedule must be sync with --cache taylor (no halos to lag), got stale; nearest: sync")
        if self.float8 and self.int8:
            raise Refusal("either --float8 or --int8 can be given, got both; leave one out")
        if self.window_shape == "square" and self.attention_backend == "triton":
            raise Refusal("--attention-backend triton has circles only, got --window-shape square; nearest: auto")
        if self.window == "full" and self.window_shape == "square":
            raise Refusal("--window-shape must be circle where the window is full, got square; nearest: circle")
        if self.window == "full" and self.text_attention == "average":
            raise Refusal("--text-attention must be exact where the window is full, got average; nearest: exact")

    def halves(self, ranks: int) -> bool:
        """Whether so many ranks share the passes of guidance; raises a Refusal where there are no halves of them."""
        if self.guidance_ranks != 2 or ranks % 2 == 0:
            return self.guidance_ranks == 2
        raise Refusal(f"--guidance-ranks 2 needs an even number of ranks for a picture, got {ranks}; nearest: 1")

    def lags_within(self, steps: int) -> bool:
        """Whether a run of `steps` steps has any stale step; the first one never is."""
        assert self.warmup_steps is not None, "settled"
        return self.schedule == "stale" and steps > max(1, self.warmup_steps)

    def may_replay(self, *, ranks: int, tokens: int, steps: int, backend: str | None) -> bool:
        """Whether the `steps` steps to come may be replayed as CUDA graphs, unless padded text is masked.

        `tokens`: those of a rank, all of the text and all pictures; `backend`: of windowed attention. Weights that
        arrive within a forward, or are looked up in it, need the host, and so does a decision; late halos another step.
        """
        decides = self.step_cache[0] == "first-block"
        waits = self.hoist_modulation or decides or (ranks > 1 and (self.shard_weights or self.schedule == "stale"))
        is_small = tokens <= MOST_REPLAYED and steps >= FEWEST_REPLAYED
        return self.cuda_graphs == "auto" and is_small and not waits and backend not in DROPPING

    @property
    def step_cache(self) -> tuple[str | None, float]:
        """Name of the step cache, if any, and its number."""
        return (None, 0) if self.cache is None else read_cache(self.cache)

    @property
    def radius(self) -> int | None:
        """Window in tokens; None: full attention."""
        return None if self.window in (None, "full") else index(self.window)  # type: ignore[arg-type]

    def settled(self, window: Window) -> Self:
        """Options with everything chosen that was left open; `window` serves where none was given."""
        chosen = window if self.window is None else self.window
        default: TextAttention = "exact" if chosen == "full" else "average"
        return replace(
            self,
            window=chosen,
            text_attention=self.text_attention or default,
            warmup_steps=WARMUP_STEPS if self.warmup_steps is None else index(self.warmup_steps),
        )


def check_window(window: object, name: str = "--window") -> None:
    """Raises a Refusal for a window that is neither None, nor a radius, nor `full`."""
    if window is None or window == "full":
        return
    if isinstance(window, bool | str) or not hasattr(window, "__index__"):
        shown = shortened(str(window))
        raise Refusal(f"{name} must be a radius in tokens, or full, got {shown!r}; nearest: 8 or full")
    check_whole_number(name, index(window), 1, 8_192)


def read_cache(text: str) -> tuple[str, float]:
    """A step cache's name and number; raises a Refusal where either is wrong."""
    name, _, word = str(text).partition(":")
    check_choice("--cache", name, tuple(STEP_CACHES))
    bounds = STEP_CACHES[name]
    try:
        number = type(bounds[0])(word)
    except ValueError:
        kind, nearest = "whole number" if name == "taylor" else "number", f"{name}:{bounds[0] or 0.1:g}"
        raise Refusal(f"--cache needs a {kind} behind {name}:, got {shortened(word)!r}; nearest: {nearest}") from None
    Flag(help=name, bounds=bounds).check(f"--cache {name}", number)
    return name, number


def nearest_word(word: str, choices: Sequence[str]) -> str:
    """Choice that was probably meant; the first one where none resembles the word."""
    begun = [choice for choice in choices if word and choice.startswith(word)]
    return next(iter(begun or difflib.get_close_matches(word, choices, n=1, cutoff=0.4)), choices[0])


def shortened(text: str) -> str:
    """`text`, without its end where it is too long for a message."""
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 3]}..."


def check_choice(name: str, word: object, choices: Sequence[object]) -> None:
    if word not in choices or isinstance(word, bool):
        shown, words = shortened(str(word)), list(map(str, choices))
        nearest = nearest_word(str(word), words)
        raise Refusal(f"{name} must be one of {', '.join(words)}, got {shown!r}; nearest: {nearest}")


def check_whole_number(name: str, value: Any, least: int, most: int) -> None:
    """Raises a Refusal for anything but a whole number from `least` to `most`."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise Refusal(f"{name} must be a whole number from {least} to {most}, got {value!r}; nearest: {least}")
    if not least <= value <= most:
        nearest = min(max(value, least), most)
        raise Refusal(f"{name} must be from {least} to {most}, got {shortened(str(value))}; nearest: {nearest}")


def check_encoding(name: str, value: object) -> None:
    """Raises a Refusal for text that is not UTF-8, which no tokenizer and no metadata takes."""
    text = str(value)
    if not isinstance(value, str | Path) or text.isprintable():
        return
    kept = text.encode(errors="ignore").decode()
    if kept != text:
        label = "the prompt" if name == "--prompt" else name
        raise Refusal(f"{label} must be UTF-8, got {shortened(text)!r}; nearest: {shortened(kept)!r}")
