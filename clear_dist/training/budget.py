"""`clear-dist distill --plan`: memory of each rank and hours of a recipe, before anything is loaded.

memory = shares of weights, masters, gradients and the optimiser's state + blocks made whole + activations
hours  = updates x forwards x (products / rate + pairs / rate + what passes through memory / bandwidth)

A forward and its backward pass: one product for the teacher, three for the student (four with checkpoints), less what
only gradients of frozen weights would take. Rates are those of `plan`, and as unmeasured.
"""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from clear_dist.cards.folder import find_model
from clear_dist.families.cards import CARDS
from clear_dist.options import Refusal, check_choice
from clear_dist.plan.model import find
from clear_dist.plan.timing import FULL_KERNEL, MEMORY, PASSES, PRODUCTS, WINDOW_KERNEL
from clear_dist.request import devices
from clear_dist.request.distill import Recipe
from clear_dist.request.hardware import GB, GPUS, Gpu, named_like
from clear_dist.request.request import Request
from clear_dist.training.counted import Counted, count
from clear_dist.training.patterns import pattern_of

STATE_BYTES = {"adamw": 8, "adamw8bit": 2, "prodigy": 16}
"""Bytes of an optimiser's state for each number that trains."""
MASTER_BYTES, AVERAGE_BYTES, GATHERED_BLOCKS = 8, 4, 2
"""Masters with their gradients; the moving average; blocks that are whole at once."""
BACKWARD = 2.5
"""Attention's backward pass, in forwards: FlashAttention computes scores again."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bytes on each rank, and seconds of the whole training; None where rates are unknown."""

    rows: dict[str, float]
    seconds: float | None

    @property
    def total(self) -> float:
        return sum(self.rows.values())


def show(recipe: Recipe, request: Request, gpu_name: str) -> int:
    """Print the budget; returns 0 where it fits, 2 where it does not."""
    gpu = _gpu(gpu_name, request)
    budget = budget_of(recipe, request.world_size, counted(recipe, request), gpu)
    table = Table("on each rank", "GB", title=f"{recipe.checkpoint_name} of {request.model_name}", title_justify="left")
    for name, size in (*budget.rows.items(), ("all in all", budget.total)):
        table.add_row(name, f"{size / GB:.2f}")
    console = Console()
    console.print(table)
    parts = recipe.batch_size, recipe.gradient_accumulation_steps, request.world_size
    whole = parts[0] * parts[1] * parts[2]
    console.print(f"{recipe.steps} updates of {' x '.join(map(str, parts))} = {whole} pictures of {request.size[1]} px")
    if budget.seconds is not None and gpu is not None:
        hours = budget.seconds / 3600
        console.print(f"about {hours:.3g} hours on {request.world_size} x {gpu.name}: counted work at assumed rates")
    if gpu is None or budget.total <= gpu.memory:
        return 0
    console.print(f"does not fit: {gpu.name} has {gpu.memory / GB:.1f} GB; nearest: {_nearest(recipe)}")
    return 2


def counted(recipe: Recipe, request: Request) -> Counted:
    """Raises a Refusal for a model whose files are not known yet."""
    facts = find_model(recipe.model, CARDS, has_cuda=request.device == "cuda")
    model = find(facts)
    if model is None or request.height is None:
        raise Refusal(f"--plan needs a model that is known, got {recipe.model}; nearest: its folder, once it is here")
    height, width = request.size
    return count(
        model,
        pattern_of(recipe.pattern, recipe.window, recipe.down_factor),
        (height // request.token_size, width // request.token_size),
        batch=recipe.batch_size,
        text_tokens=request.max_sequence_length + model.further_text_tokens,
        dtype=request.dtype,
        teacher=recipe.teacher,
        every=recipe.attention_every,
    )


def budget_of(recipe: Recipe, ranks: int, found: Counted, gpu: Gpu | None) -> Budget:
    average = AVERAGE_BYTES if recipe.ema_decay else 0
    again = int(recipe.gradient_checkpointing)
    activations = found.checkpoints + found.saved / found.blocks if again else found.saved
    rows = {
        "weights, student's and teacher's": (found.frozen + found.trained * found.itemsize) / ranks,
        "blocks while they are whole": GATHERED_BLOCKS * found.largest_block * (ranks > 1),
        "masters, gradients, average": found.trained * (MASTER_BYTES + average + found.itemsize) / ranks,
        f"state of {recipe.optimizer}": found.trained * STATE_BYTES[recipe.optimizer] / ranks,
        "activations": activations,
        "attention outputs of the teacher": found.compared,
    }
    if gpu is None or not gpu.flops:
        return Budget(rows=rows, seconds=None)
    products = found.products * (3 + again) + found.trained_products
    seconds = products / (gpu.flops * PRODUCTS)
    seconds += found.student * (1 + again + BACKWARD) / (gpu.flops * WINDOW_KERNEL)
    seconds += found.teacher / (gpu.flops * FULL_KERNEL)
    seconds += found.numbers * PASSES * found.itemsize * (4 + again) / (gpu.bandwidth * MEMORY)
    return Budget(rows=rows, seconds=seconds * recipe.steps * recipe.gradient_accumulation_steps)


def _gpu(name: str, request: Request) -> Gpu | None:
    """The kind asked for, or that of this machine; on a CPU none."""
    if name != "auto":
        check_choice("--gpu", name.lower(), tuple(GPUS))
        return GPUS[name.lower()]
    here = devices.gpus_for("auto")
    if here:
        return named_like(here[0].name)
    return None if request.model_name == "demo" else next(iter(GPUS.values()))


def _nearest(recipe: Recipe) -> str:
    ways = []
    if not recipe.gradient_checkpointing:
        ways.append("--gradient-checkpointing")
    if recipe.batch_size > 1:
        ways.append("--batch-size 1")
    if recipe.optimizer != "adamw8bit":
        ways.append("--optimizer adamw8bit")
    if recipe.teacher == "same":
        ways.append("--teacher int8")
    return ", ".join([*ways, "a larger --nproc"])
