"""To which alternatives of the circle can a model be distilled (our counterpart of Tables 1 and 2, Fig. 3 and 11)?

    python -m benchmarks.fidelity.alternatives --cache CACHE --results alternatives

Distils the teacher to each pattern by one recipe, draws the same prompts from the same noise, and compares the pictures
with the teacher's. CACHE is the folder `cache` that `clear-dist distill` makes of its pictures; one of another model or
size is refused. With --flow-alone each is distilled a second time, without what brings it near the teacher (alpha and
beta of Eq. 6 are 0). What is distilled is kept, so that an interrupted run goes on, as does a longer one (--steps).

- GFLOPs: of attention in a layer. Here it is the mean over layers, at FLUX.1-dev's shape the first layer's, beside the
  paper's, which were rounded twice. Linear attention counts as one head of all channels, as in the paper.
- held out: the flow's loss of samples kept from training, the teacher's beside it.
- PSNR, SSIM: of pictures against the teacher's, medians over prompts.
- shown: share of what prompts name that a small network finds in the pictures, the teacher's beside it.
"""

import csv
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.fidelity.alternatives_shown import contact_sheet, plot, table
from benchmarks.fidelity.contenders import CONTENDERS, Contender, operations
from benchmarks.fidelity.kept import held_out_prompts
from benchmarks.fidelity.stock import drawn
from benchmarks.gpu.ready import in_one_line
from benchmarks.lib.flags import Parser, pixels, positive, whole_number
from benchmarks.lib.machine import machine, save
from clear_dist import demo
from clear_dist.comm.group import Group
from clear_dist.commands.distill import settled
from clear_dist.evaluate.attributes import accuracy
from clear_dist.evaluate.scores import likeness
from clear_dist.families.flux.card import CARD
from clear_dist.families.transformers import family_of
from clear_dist.launch.env import Place
from clear_dist.options import Refusal
from clear_dist.pictures import replacing
from clear_dist.request.distill import Recipe
from clear_dist.training.caching import require_made_for
from clear_dist.training.curves import Curves
from clear_dist.training.patterns import pattern_of
from clear_dist.training.run import Distillation
from clear_dist.training.samples import Samples
from clear_dist.training.student import Student
from clear_dist.training.trainer import Trainer
from clear_dist.weights.loading import load_pipeline

LOSSES = ("all", "flow")
"""Those of Eq. 6, and the flow's alone."""
MUST_AGREE = ("model", "res", "max_sequence_length")
"""Settings of the cache."""
ONLY_IN_JSON = ("curve", "shown_of_each")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One student: a pattern, and the losses that it learns by."""

    contender: Contender
    losses: str
    """One of LOSSES."""
    work: Distillation

    @classmethod
    def settled(cls, contender: Contender, losses: str, arguments: Any) -> "Run":
        """Raises a Refusal for what `clear-dist distill` would refuse, and for a cache of another model or size."""
        weights = {"prediction_weight": 0.0, "attention_weight": 0.0} if losses == "flow" else {}
        recipe = Recipe(
            model=arguments.teacher,
            data=arguments.cache,
            output=arguments.results / (contender.name if losses == "all" else f"{contender.name}_{losses}"),
            pattern=contender.pattern,
            window=contender.size or 1,
            res=arguments.res,
            steps=arguments.steps,
            batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            held_out=arguments.held_out,
            checkpointing_steps=max(100, arguments.steps // 10),
            **weights,
        )
        work = Distillation(recipe=recipe, request=settled(recipe, Place()))
        if not Path(work.request.model).is_dir():
            raise Refusal(f"--teacher must be demo or a folder, got {arguments.teacher}; nearest: demo")
        require_made_for(arguments.cache, {name: getattr(work.settings, name) for name in MUST_AGREE})
        return cls(contender=contender, losses=losses, work=work)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="folder of samples")
    parser.add_argument("--results", type=Path, default=Path("alternatives"), help="tables, plots, what is distilled")
    parser.add_argument("--teacher", default="demo", help="the embedded model, or a FLUX pipeline's folder (demo)")
    parser.add_argument("--res", type=pixels, default=512, help="side of the cache's pictures (512)")
    parser.add_argument("--flow-alone", action="store_true", help="distil each also by the flow's loss alone")
    parser.add_argument("--steps", type=whole_number, default=2000, help="updates of each student (2000)")
    parser.add_argument("--batch-size", type=whole_number, default=8, help="(8)")
    parser.add_argument("--learning-rate", type=positive, default=2e-4, help="(0.0002)")
    parser.add_argument("--held-out", type=whole_number, default=32, help="the cache's samples kept from training (32)")
    parser.add_argument("--prompts", type=whole_number, default=8, help="pictures drawn with each (8)")
    parser.add_argument("--drawing-steps", type=whole_number, default=demo.DEFAULT_STEPS, help="(20)")
    parser.add_argument("--only", nargs="+", choices=[each.name for each in CONTENDERS], help="names (all)")
    in_one_line(partial(compare, parser.parse_args()))


def compare(arguments: Any) -> None:
    if missing := [name for name in ("matplotlib", "torchmetrics") if find_spec(name) is None]:
        rule = f"plots and scores need {missing[0]}, which is missing"
        raise Refusal(f"{rule}; nearest: pip install -e '.[bench]'")
    runs = [
        Run.settled(contender, losses, arguments)
        for contender in CONTENDERS
        if arguments.only is None or contender.name in arguments.only
        for losses in (LOSSES if arguments.flow_alone else LOSSES[:1])
    ]
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # nothing writes into a block's output
    group = Group.create("cpu" if not torch.cuda.is_available() else "cuda")
    captions = held_out_prompts(arguments.prompts)
    shown = {"res": arguments.res, "steps": arguments.drawing_steps}
    teachers = drawn(loaded(runs[0], group), captions, **shown)
    pictures = {losses: {"teacher": teachers} for losses in LOSSES}
    settings = {name: value for name, value in vars(arguments).items() if not isinstance(value, Path)}
    rows: list[dict[str, Any]] = []
    for run in runs:
        student, losses = distilled(run, group)
        made = pictures[run.losses][run.contender.title] = drawn(student, captions, **shown)
        costs = operations(run.contender, run.work.grid[0], student.transformer.config)
        about = {**asdict(run.contender), "losses": run.losses}
        rows.append({**about, **costs, **losses, **compared(made, teachers, captions)})
        print(f"{run.contender.title}, {run.losses}: {rows[-1]['psnr']:.1f} dB", flush=True)
        write({"machine": machine(group.device), "settings": settings, "rows": rows}, arguments.results)
    plot(rows, arguments.results / "curves.png")
    for losses in dict.fromkeys(run.losses for run in runs):
        contact_sheet(pictures[losses], captions, arguments.results / f"pictures_{losses}.jpg")
    print(table(rows))
    group.close()


def loaded(run: Run, group: Group) -> Any:
    folder = Path(run.work.request.model)
    return load_pipeline(folder, CARD, with_text_encoders=True, dtype=torch.float32, device=group.device)


def distilled(run: Run, group: Group) -> tuple[Any, dict[str, Any]]:
    """The teacher's pipeline with the student's transformer, and its losses."""
    pipe, recipe = loaded(run, group), run.work.recipe
    family = family_of(pipe.transformer)
    student = Student.of(pipe.transformer, pattern_of(recipe.pattern, recipe.window), run.work.grid)
    samples = Samples(recipe.data, recipe.held_out, recipe.seed)
    trainer = Trainer(student, family, samples, recipe, group)
    recipe.output.mkdir(parents=True, exist_ok=True)
    curves = Curves(recipe.output, trainer.optimisation.steps)
    trainer.run(lambda figures: curves.add(figures, None))
    held_out = trainer.held_out()
    student.passes.outputs.clear()  # it draws from now on, with no teacher beside it
    assert held_out is not None, "the parser asks for one sample at least"
    curve = distances(recipe.output / "losses.csv")
    return pipe, {"held_out": held_out[0], "held_out_teacher": held_out[1], "curve": curve}


def distances(file: Path) -> list[tuple[int, float]]:
    """(step, distance to the teacher's prediction) of `losses.csv`."""
    with file.open(newline="") as stream:
        return [(int(row["step"]), float(row["prediction"])) for row in csv.DictReader(stream)]


def compared(pictures: np.ndarray, teachers: np.ndarray, captions: Sequence[str]) -> dict[str, Any]:
    """Scores of pictures, bytes [B, H, W, 3], against the teacher's, and what both show of their captions."""
    mine, theirs = torch.from_numpy(pictures), torch.from_numpy(teachers)
    summary, shown = likeness(mine, theirs).summary(), accuracy(mine, captions)
    return {
        "psnr": summary["psnr"],
        "ssim": summary["ssim"],
        "shown": shown["all"],
        "shown_teacher": accuracy(theirs, captions)["all"],
        "shown_of_each": shown,
    }


def write(report: dict[str, Any], folder: Path) -> None:
    """`alternatives.json` with curves and what is shown of each attribute, `alternatives.csv` and `.md` without."""
    save(report, folder / "alternatives.json")
    short = [{name: value for name, value in row.items() if name not in ONLY_IN_JSON} for row in report["rows"]]
    with replacing(folder / "alternatives.csv") as partial, partial.open("w", newline="") as stream:
        lines = csv.DictWriter(stream, short[0])
        lines.writeheader()
        lines.writerows(short)
    with replacing(folder / "alternatives.md") as partial:
        partial.write_text(table(report["rows"]))


if __name__ == "__main__":
    main()
