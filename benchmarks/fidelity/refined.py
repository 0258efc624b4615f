"""Which way of refining enlarged pictures is best for what?

    python -m benchmarks.fidelity.refined --results benchmarks/results/DATE-cpu/refined --page docs/pictures.md

Draws the same prompts and seeds with the embedded model in stages from 256 px up, refined by SDEdit with several shares
of noise, by I-Max and by HiFlow. Each result, halved, is compared with the picture of the stage below, which `generate`
draws at half the size; what is finer than that stage could show is measured as detail, beside that of the renderer's
picture of the scene, and of the stage below enlarged alone. What has been drawn is kept, so that an interrupted run
goes on. Writes refined.json, a sheet for each size, and the page's table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

import clear_dist
from benchmarks.fidelity.embedded import SCENES, as_bytes, drawn, kept, loaded
from benchmarks.fidelity.kept import digest, held_out_prompts, keep_settings
from benchmarks.fidelity.refined_shown import show
from benchmarks.lib.flags import Parser, pixels, whole_number
from benchmarks.lib.machine import machine, save
from clear_dist import demo
from clear_dist.demo.data import HELD_OUT_SEED, scene
from clear_dist.evaluate.attributes import accuracy
from clear_dist.evaluate.scores import likeness
from clear_dist.stages import Upscaling

TOP = 128.0
"""dB of two equal pictures."""
SHOWN = 2
"""Pictures on a sheet."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way of refining, and its share of noise where it takes one."""

    title: str
    refinement: str
    strength: float = demo.DEFAULT_STRENGTH

    @property
    def upscaling(self) -> Upscaling:
        """Settings of the upper stages, as the command line has them for the embedded model."""
        usual = Upscaling(guidance_scale=0.0, strength=self.strength)
        return usual.above(demo.DEFAULT_STEPS, self.refinement)


WAYS = (
    *(Way(title=f"SDEdit {strength}", refinement="sdedit", strength=strength) for strength in (0.3, 0.5, 0.7)),
    Way(title="I-Max", refinement="imax"),
    Way(title="HiFlow", refinement="hiflow"),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Picture `index` of a size: prompts in turn, each with a seed of its own."""

    index: int
    res: int
    folder: Path

    @property
    def scene(self) -> int:
        return SCENES[self.index % len(SCENES)]

    @property
    def prompt(self) -> str:
        return held_out_prompts(self.scene + 1)[self.scene]

    def drawn(self, pipe: Any, way: Way, res: int) -> Any:
        """The whole request at `res`, timed."""
        how = {"num_inference_steps": demo.DEFAULT_STEPS, "upscaling": way.upscaling}
        name = f"{self.index}_{way.title.replace(' ', '-').lower() if res > demo.NATIVE_SIZE else 'first'}_{res}.png"
        return kept(self.folder / name, lambda: drawn(pipe, self.prompt, res=res, seed=self.index, **how))

    def rendered(self) -> Image.Image:
        return Image.fromarray(scene(HELD_OUT_SEED + self.scene, self.res)[1])


def main() -> None:
    arguments = parsed()
    pipe, group = loaded()
    clear_dist.parallelize(pipe, group=group, clear_weights=demo.CLEAR_WEIGHTS, text_attention="exact")
    rows = []
    for res, count in zip(arguments.sizes, arguments.pictures, strict=True):
        for index in range(count):
            case = Case(index=index, res=res, folder=arguments.drawn)
            rows += [measured(pipe, case, way) for way in WAYS]
            plain = case.drawn(pipe, WAYS[0], res // 2).picture.resize((res, res), Image.Resampling.BICUBIC)
            rows += [alone(case, "enlarged alone", plain), alone(case, "the renderer's", case.rendered())]
            print(f"{res} px, picture {index + 1} of {count}: {case.prompt}", flush=True)
    group.close()
    figures = [figure(rows, res, title) for res in arguments.sizes for title in dict.fromkeys(r["way"] for r in rows)]
    contents = {"machine": machine(torch.device("cpu")), "model": digest(demo.WEIGHTS), "figures": figures}
    save({**contents, "pictures": rows}, arguments.results / "refined.json")
    sizes = zip(arguments.sizes, arguments.pictures, strict=True)
    show(figures, {res: sheet_of(pipe, res, min(count, SHOWN), arguments.drawn) for res, count in sizes}, arguments)


def parsed() -> Any:
    parser = Parser(__doc__)
    parser.add_argument("--sizes", type=pixels, nargs="+", default=[1024, 2048], help="in pixels (1024 2048)")
    parser.add_argument("--pictures", type=whole_number, nargs="+", default=[6, 3], help="of each size (6 3)")
    parser.add_argument("--drawn", type=Path, default=Path("fidelity/refined"), help="folder of what was drawn")
    parser.add_argument("--results", type=Path, default=Path("fidelity/refined"), help="folder of figures and sheets")
    parser.add_argument("--page", type=Path, help="document whose table is replaced (none)")
    arguments = parser.parse_args()
    if len(arguments.sizes) != len(arguments.pictures) or min(arguments.sizes) < 4 * demo.NATIVE_SIZE // 2:
        parser.error(f"sizes must be {2 * demo.NATIVE_SIZE} px or more, each with its number of pictures")
    try:
        keep_settings(arguments.drawn, {"model": digest(demo.WEIGHTS)})
    except ValueError as error:
        parser.error(str(error))
    arguments.results.mkdir(parents=True, exist_ok=True)
    return arguments


def measured(pipe: Any, case: Case, way: Way) -> dict[str, Any]:
    """Figures of a refined picture."""
    first, below, result = (case.drawn(pipe, way, res) for res in (demo.NATIVE_SIZE, case.res // 2, case.res))
    found = likeness(as_bytes(result.picture.reduce(2)), as_bytes(below.picture))
    assert found.ms_ssim is not None, "the smallest stage is large enough for it"
    start = likeness(as_bytes(result.picture.reduce(case.res // demo.NATIVE_SIZE)), as_bytes(first.picture))
    return {
        **{"res": case.res, "picture": case.index, "way": way.title, "steps": way.upscaling.steps},
        **{"psnr": min(found.psnr[0], TOP), "ms_ssim": found.ms_ssim[0]},
        **{"psnr_first": min(start.psnr[0], TOP), **details(result.picture)},
        **{"shown": accuracy(as_bytes(result.picture), [case.prompt])["all"]},
        **{"seconds": result.seconds, "processor_seconds": result.processor_seconds},
    }


def alone(case: Case, title: str, picture: Image.Image) -> dict[str, Any]:
    """Detail of a picture that the model has not refined."""
    return {"res": case.res, "picture": case.index, "way": title, **details(picture)}


def details(picture: Image.Image) -> dict[str, float]:
    """Detail beyond the stage below, and beyond the first one."""
    below, first = picture.width // 2, demo.NATIVE_SIZE
    return {"detail": detail(picture, below), "detail_first": detail(picture, first)}


def detail(picture: Image.Image, side: int) -> float:
    """Root mean square, in grey levels of 255, of what is finer than `side` pixels across the picture can show.

    Those are frequencies above that size's Nyquist along either axis. The picture is mirrored first: its borders are no
    edges.
    """
    grey = np.asarray(picture.convert("L"), dtype=np.float32)
    grey = np.concatenate([grey, grey[::-1]])
    grey = np.concatenate([grey, grey[:, ::-1]], axis=1)
    waves = np.fft.fft2(grey)
    rows, columns = (np.abs(np.fft.fftfreq(each)) < side / picture.width / 2 for each in grey.shape)
    waves[rows[:, None] & columns] = 0
    return float(np.sqrt(np.mean(np.square(np.fft.ifft2(waves).real))))


def figure(rows: list[dict[str, Any]], res: int, title: str) -> dict[str, Any]:
    """Medians over a size's pictures; the share shown is a mean."""
    those = [row for row in rows if row["res"] == res and row["way"] == title]
    names = [name for name, value in those[0].items() if isinstance(value, float)]
    found: Mapping[str, float] = {name: median(row[name] for row in those) for name in names}
    shown = {"shown": float(np.mean([row["shown"] for row in those]))} if "shown" in found else {}
    return {"res": res, "way": title, "steps": those[0].get("steps"), "pictures": len(those), **found, **shown}


def sheet_of(pipe: Any, res: int, count: int, folder: Path) -> list[list[tuple[str, Image.Image]]]:
    """The first pictures of a size: each whole, and a part at its true size, beside the stage below."""
    rows = []
    for index in range(count):
        case = Case(index=index, res=res, folder=folder)
        below = case.drawn(pipe, WAYS[0], res // 2).picture
        results = {way.title: case.drawn(pipe, way, res).picture for way in WAYS}
        named = {"stage below, enlarged": below.resize((res, res), Image.Resampling.BICUBIC)} | results
        side = demo.NATIVE_SIZE
        box = busiest(below, side)
        rows.append(
            [(title, picture.resize((side, side), Image.Resampling.LANCZOS)) for title, picture in named.items()]
        )
        rows.append([(f"{title}, {side} of {res} px", picture.crop(box)) for title, picture in named.items()])
    return rows


def busiest(below: Image.Image, side: int) -> tuple[int, int, int, int]:
    """The square of `side` pixels, twice as large as `below`, with the steepest edges: box of PIL."""
    grey = np.asarray(below.convert("L"), dtype=np.float32)
    steps = np.hypot(*np.gradient(grey)) ** 2
    tile = side // 2
    sums = steps[: len(steps) // tile * tile, : len(steps) // tile * tile].reshape(len(steps) // tile, tile, -1, tile)
    row, column = np.unravel_index(sums.sum(axis=(1, 3)).argmax(), (len(steps) // tile,) * 2)
    return int(column) * side, int(row) * side, (int(column) + 1) * side, (int(row) + 1) * side


if __name__ == "__main__":
    main()
