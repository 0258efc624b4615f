"""A recipe of `clear-dist distill`: a TOML file, over which flags go; checked, and written again, without torch.

Names are those of diffusers' training scripts where they have one.
"""

import json
import tomllib
from dataclasses import Field, asdict, dataclass, field, fields, make_dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args, get_type_hints

from clear_dist.options import Flags, Refusal, flag, shortened
from clear_dist.request.request import Request

WHAT, DATA, HOW, KEPT = "What is made", "Pictures", "How it learns", "What is written"
DISTILL_PANELS = (WHAT, DATA, HOW, KEPT)
COUNT, MANY = (1, 1_000_000), (0, 1_000_000)
OPTIMISERS = {"adamw": None, "adamw8bit": "torchao", "prodigy": "prodigyopt"}
"""Packages that they are in, of the extra `train`."""
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
READY = Path(__file__).parents[1] / "training" / "recipes"
RECIPE = "recipe.toml"
"""Name in a checkpoint and beside the result."""
WORDS = {int: "a whole number", float: "a number", str: "a text", Path: "a path", bool: "true or false"}
PATTERN_SIZES = {
    "circle": "radius",
    "neighbourhood": "radius",
    "swin": "side",
    "strided": "stride",
    "convolved": "factor",
    "agent": "factor",
    "slots": "slots",
    "linear": None,
    "sigmoid": None,
}
"""Patterns, and what `window` is in each; None: it has no size. They are made in `training/patterns`."""
FREE = ("output", "steps", "checkpointing_steps", "validation_steps", "validation_prompts", "nproc", "device")
"""Settings that a run may go on with other values of."""


@dataclass(frozen=True, kw_only=True)
class Recipe(Flags):
    """All settings of a distillation; raises a Refusal where one is out of bounds or two contradict."""

    model: str = flag("auto", "the teacher: auto, demo, a short name, a hub id, or a folder (auto)", WHAT)
    revision: str | None = flag(None, "of a hub model", WHAT)
    pattern: str = flag("circle", "who attends to whom (circle)", WHAT, choices=tuple(PATTERN_SIZES))
    window: int = flag(
        16, "radius in tokens; other patterns' side, stride, factor or number of slots (16)", WHAT, bounds=(1, 512)
    )
    down_factor: int = flag(1, "each d x d keys make one more for all image tokens; 1: none (1)", WHAT, bounds=(1, 64))
    res: int | None = flag(
        None, "side of the square pictures in pixels (the model's native size)", WHAT, bounds=(16, 16_384)
    )
    max_sequence_length: int | None = flag(None, "text tokens (as many as the model asks for)", WHAT, bounds=(1, 512))
    data: Path | None = flag(
        None, "pictures beside .json (key prompt) or .txt, webdataset's tar of such, or caches of CLEAR's code", DATA,
        metavar="FOLDER|TAR",
    )  # fmt: skip
    self_generate: int | None = flag(
        None, "draw so many pictures with the teacher instead, from --prompts", DATA, bounds=COUNT, metavar="N"
    )
    prompts: Path | None = flag(None, "one prompt a line: of --self-generate", DATA, metavar="FILE")
    held_out: int = flag(
        0, "samples kept from training, whose loss is measured at each checkpoint (0)", DATA, bounds=MANY
    )
    steps: int = flag(
        10_000, "updates of the weights (10000)", HOW, names=("--steps", "--max-train-steps"), bounds=COUNT
    )
    batch_size: int = flag(
        1, "pictures of a forward on each rank (1)", HOW, names=("--batch-size", "--train-batch-size"), bounds=(1, 4096)
    )
    gradient_accumulation_steps: int = flag(1, "forwards of an update (1)", HOW, bounds=(1, 4096))
    optimizer: str = flag("adamw", "adamw, its 8-bit form, or prodigy (adamw)", HOW, choices=tuple(OPTIMISERS))
    learning_rate: float = flag(1e-4, "for prodigy: 1 (0.0001)", HOW, bounds=(0.0, 100.0))
    lr_scheduler: str = flag("constant", "how the rate changes (constant)", HOW, choices=SCHEDULES)
    lr_warmup_steps: int = flag(0, "updates (0)", HOW, bounds=MANY)
    weight_decay: float = flag(1e-4, "decoupled (0.0001)", HOW, bounds=(0.0, 10.0))
    max_grad_norm: float = flag(1.0, "norm that longer gradients are shortened to (1)", HOW, bounds=(1e-6, 1e9))
    ema_decay: float = flag(
        0.0, "of a moving average of the weights, which is then the result; 0: none (0)", HOW, bounds=(0.0, 0.99999)
    )
    prediction_weight: float = flag(
        0.5, "alpha: of the distance to the teacher's prediction (0.5)", HOW, bounds=(0.0, 1e4)
    )
    attention_weight: float = flag(0.5, "beta: of the distance to its attention outputs (0.5)", HOW, bounds=(0.0, 1e4))
    attention_every: int = flag(1, "compare every so many of the layers; CLEAR's code: 4 (1)", HOW, bounds=(1, 1000))
    guidance_scale: float = flag(3.5, "of models with distilled guidance (3.5)", HOW, bounds=(0.0, 100.0))
    teacher: str = flag(
        "same",
        "the teacher's own weights: same as the student's, int8, float8 (same)",
        HOW,
        choices=("same", "int8", "float8"),
    )
    gradient_checkpointing: bool = flag(
        False, "compute activations again instead of keeping them: less memory, a third more time", HOW
    )
    dtype: str = flag("auto", "auto: bfloat16 on CUDA, float32 on CPU", HOW, choices=("auto", "bfloat16", "float32"))
    seed: int = flag(0, "of times, noise and order (0)", HOW, bounds=(0, 2**20))
    output: Path = flag(
        Path("distilled"), "folder of the result, checkpoints, curves and caches (distilled)", KEPT, metavar="FOLDER"
    )
    checkpointing_steps: int = flag(500, "updates from one checkpoint to the next (500)", KEPT, bounds=COUNT)
    validation_steps: int | None = flag(
        None, "updates from one sheet of samples to the next (none are drawn)", KEPT, bounds=COUNT
    )
    validation_prompts: Path | None = flag(
        None, "what sheets show, one prompt a line (captions of --data, held out if there are any)", KEPT,
        metavar="FILE",
    )  # fmt: skip
    device: str = flag("auto", "auto: CUDA where it is", choices=("auto", "cpu", "cuda"))
    nproc: int | None = flag(None, "ranks to start here (visible GPUs; 1 on CPU); not under torchrun", bounds=(1, 1024))

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.data is None) == (self.self_generate is None):
            got = "neither" if self.data is None else "both"
            raise Refusal(
                f"either --data or --self-generate says where pictures come from, got {got}; nearest: --data FOLDER"
            )
        if self.self_generate is not None and self.prompts is None:
            raise Refusal("--self-generate needs prompts, got none; nearest: --prompts FILE")
        if self.validation_prompts is not None and self.validation_steps is None:
            raise Refusal("--validation-prompts needs --validation-steps, got none; nearest: 500")
        if self.down_factor > 1 and self.pattern != "circle":
            rule = f"--down-factor must be 1 for --pattern {self.pattern}"
            raise Refusal(f"{rule}, got {self.down_factor}; nearest: --pattern circle")

    def require_packages(self) -> None:
        """Raises a Refusal where the optimiser's package is missing."""
        package = OPTIMISERS[self.optimizer]
        if package is not None and find_spec(package) is None:
            rule = f"--optimizer {self.optimizer} needs the package {package}, which is not installed"
            raise Refusal(f"{rule}; nearest: pip install 'clear-dist[train]'")

    @property
    def settings(self) -> dict[str, Any]:
        """Values as TOML has them; None is left out."""
        held = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: str(value) if isinstance(value, Path) else value for name, value in held.items()}

    def is_kept(self, step: int) -> bool:
        """Whether a checkpoint follows an update."""
        return step % self.checkpointing_steps == 0 or step == self.steps

    @property
    def checkpoint_name(self) -> str:
        """A CLEAR file's; other patterns' files are named after them."""
        kind = "local" if self.pattern == "circle" else self.pattern
        size = f"_{self.window}" if PATTERN_SIZES[self.pattern] else ""
        down = f"_down_{self.down_factor}" if self.down_factor > 1 else ""
        return f"clear_{kind}{size}{down}.safetensors"


def _optional(each: Field) -> tuple[str, Any, Any]:
    kind: Any = each.type
    return each.name, kind | None, field(default=None, metadata=each.metadata)


@dataclass(frozen=True, kw_only=True)
class _About(Flags):
    """Flags that are no part of a recipe."""

    config: Path | None = flag(
        None, "a recipe, TOML, or a ready one's name (demo-r4), that flags override", WHAT, metavar="FILE"
    )
    plan: bool = flag(False, "tell memory and time, and load nothing")
    gpu: str = flag("auto", "kind of GPU that --plan is for (those of this machine; else H100)")
    traceback: bool = flag(False, "if a rank fails, show where")


DistillFlags: type[Flags] = make_dataclass(
    "DistillFlags", [_optional(each) for each in fields(Recipe)], bases=(_About,), frozen=True, kw_only=True
)
"""A recipe's settings as flags; None: not given."""
NAMES = tuple(each.name for each in fields(Recipe))


def read_recipe(flags: Any) -> Recipe:
    """The recipe of `--config`, or the defaults, with what the flags give on top."""
    values = {} if flags.config is None else _read(_config(flags.config), "--config")
    recipe = Recipe(**values | {name: getattr(flags, name) for name in NAMES if getattr(flags, name) is not None})
    if flags.window is not None and PATTERN_SIZES[recipe.pattern] is None:
        rule = f"--window must be left out for --pattern {recipe.pattern}, which has no size"
        raise Refusal(f"{rule}, got {flags.window}; nearest: --pattern circle")
    return recipe


def require_left(held_out: int, samples: int) -> None:
    """Raises a Refusal where no samples are left to train on."""
    if samples <= held_out:
        raise Refusal(f"--held-out must leave samples to train on, got {held_out} of {samples}; nearest: 0")


def require_grid(recipe: Recipe, request: Request) -> None:
    """Raises a Refusal where the tokens of a side cannot be pooled; a hub model's size is known once it is located."""
    if request.height is None:
        return
    side, token = request.height // request.token_size, request.token_size
    is_convolved = recipe.pattern == "convolved"
    name, factor = ("--window", recipe.window) if is_convolved else ("--down-factor", recipe.down_factor)
    if side % factor:
        nearest = max(side // factor, 1) * factor * token
        raise Refusal(f"{name} must divide the {side} tokens of a side, got {factor}; nearest: --res {nearest}")


def _config(file: Path) -> Path:
    """A file, or a ready recipe by its name."""
    ready = READY / f"{file}.toml"
    return ready if ready.is_file() and not file.is_file() else file  # a result's folder may have its name


def checkpoints_in(output: Path) -> list[Path]:
    """Folders of whole ones, the newest last."""
    folders = [folder for folder in output.glob("checkpoint-*") if folder.name.partition("-")[2].isdecimal()]
    return sorted(folders, key=lambda folder: int(folder.name.partition("-")[2]))


def newest_checkpoint(output: Path) -> Path | None:
    return next(reversed(checkpoints_in(output)), None)


def to_toml(recipe: Recipe) -> str:
    """JSON's strings and numbers are TOML's too."""
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in recipe.settings.items())


def require_same(recipe: Recipe, folder: Path) -> None:
    """Raises a Refusal where the recipe differs from that of a checkpoint in more than how long it runs."""
    held, mine = Recipe(**_read(folder / RECIPE, "the checkpoint's recipe")).settings, recipe.settings
    for name in NAMES:
        if name not in FREE and held.get(name) != mine.get(name):
            raise Refusal(
                f"{folder} is of another recipe, whose {name} is {held.get(name, 'not set')}, "
                f"got {mine.get(name, 'nothing')}; nearest: another --output"
            )


def _read(file: Path, what: str) -> dict[str, Any]:
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        why = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise Refusal(f"{what} must be a TOML file, got {shortened(str(file))} ({why})") from error
    hints = get_type_hints(Recipe)
    for name, value in values.items():
        if name not in NAMES:
            close = get_close_matches(name, NAMES, n=1)
            raise Refusal(f"{file} has the unknown setting {name}; nearest: {close[0] if close else 'leave it out'}")
        kinds = get_args(hints[name]) or (hints[name],)
        if Path in kinds and isinstance(value, str):
            values[name] = Path(value)
        elif float in kinds and type(value) is int:
            values[name] = float(value)
        elif type(value) not in kinds:
            wanted = next(WORDS[kind] for kind in kinds if kind in WORDS)
            raise Refusal(f"{name} must be {wanted} in {file}, got {shortened(repr(value))}; nearest: leave it out")
    return values
