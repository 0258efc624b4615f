"""What a plan asks the engine and is answered, in JSON; nothing here imports torch, `measure.py` answers elsewhere."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from clear_dist.options import Options

Amounts = Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Module:
    """A module that can be made without values: `library.Class`, and its config.json."""

    kind: str
    config: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Question:
    module: Module
    dtype: str
    device: str
    """`cpu` or `cuda`, on which it would run."""
    ranks: int


@dataclass(frozen=True, kw_only=True)
class WeightsQuestion(Question):
    options: Options


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The transformer's on one rank, in bytes but for the last three."""

    whole: int
    """All of them, in the dtype asked for."""
    held: int
    """All the time."""
    loading: int
    """While they are loaded and made smaller, on one rank: a layer at a time on a GPU; a CPU maps all of the files."""
    sent: int
    """In one pass: a rank's share of all that is in shards, once."""
    as_stored: int
    """The part of `held` that may still be pages of the files it came from."""
    modulation: int
    """What `--hoist-modulation` keeps in host memory."""
    modulation_outputs: int
    """Numbers that these layers put out, for a picture in a step."""
    products: int
    """Numbers that all tokens are multiplied with."""
    blocks: int


@dataclass(frozen=True, kw_only=True)
class StepQuestion(Question):
    """A denoising step of one rank; sizes in tokens."""

    options: Options
    transport: Literal["nccl", "gloo", "host"]
    height: int
    width: int
    rank: int
    images: int
    text_tokens: int
    passes: int
    down_factor: int
    has_lora: bool
    steps: int
    """The stage's where halos lag; else 1."""
    shifts: bool = False
    """Whether even steps have their patches half a token off, where the model can take that."""
    text_block: int | None = None
    """Side of the blocks that each have a copy of the text, where the model can take that; None: there is one text."""
    halves: bool = False
    """Whether there are twice as many ranks, of which half takes a pass, or half of the images."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """All passes and pictures of a step together."""

    peak: Amounts
    """Bytes by row of the table, when most is alive; without weights."""
    where: str
    """Function at work then."""
    masks: int
    """Bytes of masks that stay."""
    bytes: Amounts
    """Handed over, by the engine's own counters."""
    operations: Amounts
    tokens: int
    """Tokens in the blocks, for one picture and pass."""
    channels: int
    grids: int
    """Grids of patches that steps take turns on, of which this one's has more tokens."""
    copies: int
    """Copies of the text on the rank that holds most."""
    copies_apart: bool
    """Whether only ranks that hold a copy exchange what it attends to."""


@dataclass(frozen=True, kw_only=True)
class VaeQuestion(Question):
    """An encode or decode of one of `ranks` stripes of equal height; 0 rows: the weights alone."""

    encode: bool = False
    rows: int = 0
    """In latents, as `columns`."""
    columns: int = 0
    images: int = 1


@dataclass(frozen=True, kw_only=True)
class VaePass:
    """All pictures of an encode or decode together."""

    weights: int
    """Bytes, as the next one."""
    peak: int = 0
    bytes: Amounts
    operations: Amounts


ANSWERS = {WeightsQuestion: Weights, StepQuestion: Step, VaeQuestion: VaePass}


def as_json(question: Question) -> dict[str, Any]:
    options = {"options": vars(question.options)} if isinstance(question, WeightsQuestion | StepQuestion) else {}
    return {"kind": type(question).__name__, **vars(question), "module": vars(question.module), **options}


def from_json(fields: Mapping[str, Any]) -> Any:
    """The question that `as_json` was given."""
    values = dict(fields)
    name = values.pop("kind")
    values["module"] = Module(**values["module"])
    if "options" in values:
        values["options"] = Options(**values["options"])
    return next(kind for kind in ANSWERS if kind.__name__ == name)(**values)
