"""To which alternatives of the circle can a model be distilled (our counterpart of Tables 1 and 2, Fig. 3 and 11)?

    python -m benchmarks.fidelity.alternatives --cache CACHE --results alternatives

Distils the teacher to each pattern by one recipe, draws the same prompts from the same noise, and compares the pictures
with the teacher's. CACHE is the folder `cache` that `clear-dist distill` makes of its pictures. What is distilled is
kept, so that an interrupted run goes on, as does a longer one (--steps).

- GFLOPs: of attention in a layer. Here it is the mean over layers, at FLUX.1-dev's shape the first layer's, beside the
  paper's, which were rounded twice. Linear attention counts as one head of all channels, as in the paper.
- held out: the flow's loss of samples kept from training, the teacher's beside it.
- PSNR, SSIM: of pictures against the teacher's, medians over prompts.
"""

import csv
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from benchmarks.fidelity.alternatives_shown import contact_sheet, plot, table
from benchmarks.lib.counts import TOKEN
from benchmarks.lib.flags import Parser, pixels, positive, whole_number
from benchmarks.lib.machine import machine, save
from clear_dist import demo
from clear_dist.comm.group import Group
from clear_dist.demo.data import HELD_OUT_SEED
from clear_dist.demo.grammar import random_caption
from clear_dist.families.flux.card import CARD
from clear_dist.families.transformers import family_of
from clear_dist.pictures import replacing
from clear_dist.request.distill import Recipe
from clear_dist.training.attention import Layout
from clear_dist.training.curves import Curves
from clear_dist.training.patterns import pattern_of
from clear_dist.training.samples import Samples
from clear_dist.training.student import Student
from clear_dist.training.trainer import Trainer
from clear_dist.weights.loading import load_pipeline

FLUX_TEXT, FLUX_SIDE, FLUX_CHANNELS = 512, 64, 3072


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A pattern at the size that it has at 512 px, where those of the paper, at 1024 px, halve."""

    title: str
    pattern: str
    size: int | None = None
    """None: the pattern has none."""
    paper_size: int | None = None
    printed: float | None = None
    """GFLOPs in Table 2."""

    @property
    def name(self) -> str:
        return self.pattern if self.size is None else f"{self.pattern}_{self.size}"


CONTENDERS = (
    Contender(title="sigmoid", pattern="sigmoid", printed=260.9),
    Contender(title="linear", pattern="linear", printed=174.0),
    Contender(title="PixArt-Sigma, 4 x 4", pattern="convolved", size=4, paper_size=4, printed=67.7),
    Contender(title="agent, 4 x 4", pattern="agent", size=4, paper_size=4, printed=80.5),
    Contender(title="slots, 64", pattern="slots", size=64, paper_size=256),
    Contender(title="strided, 4 x 4", pattern="strided", size=4, paper_size=4, printed=67.7),
    Contender(title="Swin, 8", pattern="swin", size=8, paper_size=16, printed=67.7),
    Contender(title="neighbourhood, r = 8", pattern="neighbourhood", size=8, paper_size=16),
    Contender(title="circle, r = 4", pattern="circle", size=4, paper_size=8, printed=63.5),
    Contender(title="circle, r = 8", pattern="circle", size=8, paper_size=16, printed=80.6),
    Contender(title="circle, r = 16", pattern="circle", size=16, paper_size=32, printed=154.1),
)
"""In Table 2's order."""


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="folder of samples")
    parser.add_argument("--results", type=Path, default=Path("alternatives"), help="tables, plots, what is distilled")
    parser.add_argument("--teacher", type=Path, default=demo.WEIGHTS, help="a FLUX pipeline's folder (the embedded)")
    parser.add_argument("--res", type=pixels, default=512, help="side of the cache's pictures (512)")
    parser.add_argument("--steps", type=whole_number, default=2000, help="updates of each student (2000)")
    parser.add_argument("--batch-size", type=whole_number, default=8, help="(8)")
    parser.add_argument("--learning-rate", type=positive, default=2e-4, help="(0.0002)")
    parser.add_argument("--held-out", type=whole_number, default=32, help="the cache's samples kept from training (32)")
    parser.add_argument("--prompts", type=whole_number, default=8, help="pictures drawn with each (8)")
    parser.add_argument("--drawing-steps", type=whole_number, default=demo.DEFAULT_STEPS, help="(20)")
    parser.add_argument("--only", nargs="+", choices=[each.name for each in CONTENDERS], help="names (all)")
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    contenders = [each for each in CONTENDERS if arguments.only is None or each.name in arguments.only]
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # nothing writes into a block's output
    group = Group.create("cpu" if not torch.cuda.is_available() else "cuda")
    pipe = loaded(arguments.teacher, group)
    shape = pipe.transformer.config
    pictures = {"teacher": drawn(pipe, arguments)}
    rows: list[dict[str, Any]] = []
    for contender in contenders:
        student, losses = distilled(contender, arguments, group)
        pictures[contender.title] = drawn(student, arguments)
        rows.append(
            {
                **asdict(contender),
                **operations(contender, arguments.res // TOKEN, shape),
                **losses,
                **compared(pictures[contender.title], pictures["teacher"]),
            }
        )
        print(f"{contender.title}: {rows[-1]['psnr']:.1f} dB", flush=True)
        write(rows, arguments.results)
        plot(rows, arguments.results / "curves.png")
        contact_sheet(pictures, prompts(arguments.prompts), arguments.results / "pictures.jpg")
    print(table(rows))
    group.close()


def loaded(folder: Path, group: Group) -> Any:
    return load_pipeline(folder, CARD, with_text_encoders=True, dtype=torch.float32, device=group.device)


def recipe(contender: Contender, arguments: Any) -> Recipe:
    return Recipe(
        data=arguments.cache,
        output=arguments.results / contender.name,
        pattern=contender.pattern,
        window=contender.size or 1,
        res=arguments.res,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        held_out=arguments.held_out,
        checkpointing_steps=max(1, arguments.steps // 10),
    )


def distilled(contender: Contender, arguments: Any, group: Group) -> tuple[Any, dict[str, Any]]:
    """The teacher's pipeline with the student's transformer, and its losses."""
    pipe = loaded(arguments.teacher, group)
    family, settings = family_of(pipe.transformer), recipe(contender, arguments)
    side = arguments.res // TOKEN
    student = Student.of(pipe.transformer, pattern_of(contender.pattern, contender.size or 1), (side, side))
    samples = Samples(arguments.cache, settings.held_out, settings.seed)
    trainer = Trainer(student, family, samples, settings, group)
    settings.output.mkdir(exist_ok=True)
    curves = Curves(settings.output, trainer.optimisation.steps)
    trainer.run(lambda figures: curves.add(figures, None))
    held_out = trainer.held_out()
    student.passes.outputs.clear()  # it draws from now on, with no teacher beside it
    assert held_out is not None
    curve = distances(settings.output / "losses.csv")
    return pipe, {"held_out": held_out[0], "held_out_teacher": held_out[1], "curve": curve}


def distances(file: Path) -> list[tuple[int, float]]:
    """(step, distance to the teacher's prediction) of `losses.csv`."""
    with file.open(newline="") as stream:
        return [(int(row["step"]), float(row["prediction"])) for row in csv.DictReader(stream)]


def operations(contender: Contender, side: int, config: Any) -> dict[str, float]:
    """GFLOPs of attention in a layer, here and at FLUX.1-dev's shape, the mean over layers."""
    layers, channels = (
        config.num_layers + config.num_single_layers,
        config.num_attention_heads * config.attention_head_dim,
    )
    return {
        "gflops": _gflops(contender, contender.size, side, layers, demo.DEFAULT_MAX_SEQUENCE_LENGTH, channels),
        "gflops_flux": _gflops(contender, contender.paper_size, FLUX_SIDE, 1, FLUX_TEXT, FLUX_CHANNELS),
    }


def _gflops(contender: Contender, size: int | None, side: int, layers: int, text: int, channels: int) -> float:
    pattern = pattern_of(contender.pattern, size or 1)
    layouts = (Layout(layer=layer, height=side, width=side, text_first=True) for layer in range(layers))
    return mean(pattern.operations(layout, text, 1, channels) for layout in layouts) / 1e9


def prompts(count: int) -> list[str]:
    """Captions of scenes that the embedded model's training did not see."""
    return [random_caption(np.random.default_rng(HELD_OUT_SEED + scene)) for scene in range(count)]


def drawn(pipe: Any, arguments: Any) -> np.ndarray:
    """Bytes [prompts, H, W, 3], prompt i from the noise of seed i."""
    captions = prompts(arguments.prompts)
    with torch.inference_mode():
        images = pipe(
            captions,
            negative_prompt=[""] * len(captions),
            height=arguments.res,
            width=arguments.res,
            num_inference_steps=arguments.drawing_steps,
            true_cfg_scale=demo.DEFAULT_TRUE_CFG_SCALE,
            max_sequence_length=demo.DEFAULT_MAX_SEQUENCE_LENGTH,
            generator=[torch.Generator().manual_seed(seed) for seed in range(len(captions))],
        ).images
    return np.stack([np.asarray(image) for image in images])


def compared(pictures: np.ndarray, teachers: np.ndarray) -> dict[str, float]:
    pairs = list(zip(teachers, pictures, strict=True))
    return {
        "psnr": median(float(peak_signal_noise_ratio(*pair)) for pair in pairs),
        "ssim": median(float(structural_similarity(*pair, channel_axis=2)) for pair in pairs),
    }


def write(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """`alternatives.json` with curves, `alternatives.csv` and `alternatives.md` without."""
    save({"machine": machine(torch.device("cpu")), "rows": list(rows)}, folder / "alternatives.json")
    short = [{name: value for name, value in row.items() if name != "curve"} for row in rows]
    with replacing(folder / "alternatives.csv") as partial, partial.open("w", newline="") as stream:
        lines = csv.DictWriter(stream, short[0])
        lines.writeheader()
        lines.writerows(short)
    with replacing(folder / "alternatives.md") as partial:
        partial.write_text(table(rows))


if __name__ == "__main__":
    main()
