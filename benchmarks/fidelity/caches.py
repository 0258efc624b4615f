"""What do step caches save, and what do they cost?

    python -m benchmarks.fidelity.caches --results benchmarks/results/DATE-cpu/caches --page docs/pictures.md

Draws the same prompts and seeds with the embedded model in one stage: without a cache, with `first-block` at several
thresholds, with `taylor` at several distances, and with fewer steps, which is what a cache has to beat. All ways take
turns on each picture. Counted are the blocks that run; compared are processor's seconds of the whole request, and the
pictures, with those drawn without a cache. What has been drawn is kept, so that an interrupted run goes on. Writes
caches.json, caches.png (the curve), caches.jpg (a sheet), and the page's table.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image

import clear_dist
from benchmarks.fidelity.caches_shown import show
from benchmarks.fidelity.embedded import SCENES, Timed, as_bytes, drawn, kept, loaded
from benchmarks.fidelity.kept import digest, held_out_prompts, keep_settings
from benchmarks.lib.flags import Parser, pixels, whole_number
from benchmarks.lib.machine import machine, save
from clear_dist import demo
from clear_dist.comm.group import Group
from clear_dist.evaluate.scores import likeness
from clear_dist.pictures import replacing

TOP = 128.0
"""dB of two equal pictures."""
BLOCKS = ("transformer_blocks", "single_transformer_blocks")


@dataclass(frozen=True, kw_only=True)
class Way:
    """A cache, or fewer steps."""

    kind: str
    """first-block, taylor, or steps; none: all is computed."""
    number: float = 0

    @property
    def title(self) -> str:
        return self.kind if self.kind == "none" else f"{self.kind}:{self.number:g}"

    @property
    def cache(self) -> str | None:
        return None if self.kind in ("none", "steps") else self.title


@dataclass(frozen=True, kw_only=True)
class Cached:
    """A picture, and what was left out of it."""

    timed: Timed
    skipped: list[int]
    """Steps that were left out in a pass of guidance."""
    blocks: int
    """Runs of a block."""


@dataclass
class Drawer:
    pipe: Any
    group: Group
    res: int
    steps: int
    folder: Path

    def draw(self, way: Way, index: int) -> Cached:
        """Picture `index`, of prompts in turn, each with a seed of its own."""
        scene, stem = SCENES[index % len(SCENES)], self.folder / f"{index}_{way.title.replace(':', '-')}"
        picture, about = stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.json")
        if not (picture.exists() and about.exists()):
            picture.unlink(missing_ok=True)
            handle = clear_dist.parallelize(
                self.pipe,
                group=self.group,
                clear_weights=demo.CLEAR_WEIGHTS,
                text_attention="exact",
                cache=way.cache,
            )
            steps = int(way.number) if way.kind == "steps" else self.steps
            prompt = held_out_prompts(scene + 1)[scene]
            how = {"num_inference_steps": steps, "cascade": False}
            with counted(self.pipe.transformer) as runs:
                kept(picture, lambda: drawn(self.pipe, prompt, res=self.res, seed=index, **how))
            found = {"skipped": list(handle.skipped_steps), "blocks": len(runs)}
            handle.undo()
            with replacing(about) as partial:
                partial.write_text(json.dumps(found))
        return Cached(timed=kept(picture, Image.Image), **json.loads(about.read_text()))


@contextmanager
def counted(model: torch.nn.Module) -> Iterator[list[None]]:
    """Has an item for each run of a block."""
    runs: list[None] = []
    blocks = [block for name in BLOCKS for block in getattr(model, name).children()]
    hooks = [block.register_forward_hook(lambda *_: runs.append(None)) for block in blocks]
    yield runs
    for hook in hooks:
        hook.remove()


def main() -> None:
    arguments = parsed()
    pipe, group = loaded()
    drawer = Drawer(pipe, group, arguments.res, arguments.steps, arguments.drawn)
    ways = (
        Way(kind="none"),
        *(Way(kind="first-block", number=each) for each in arguments.thresholds),
        *(Way(kind="taylor", number=each) for each in arguments.distances),
        *(Way(kind="steps", number=each) for each in arguments.fewer),
    )
    rows: list[dict[str, Any]] = []
    pictures: dict[str, Image.Image] = {}
    for index in range(arguments.pictures):
        drawn_ways = {way: drawer.draw(way, index) for way in ways}
        rows += [measured(way, index, each, drawn_ways[ways[0]]) for way, each in drawn_ways.items()]
        pictures = pictures or {way.title: each.timed.picture for way, each in drawn_ways.items()}
        print(f"picture {index + 1} of {arguments.pictures}", flush=True)
    group.close()
    figures = [figure(rows, way) for way in ways]
    contents = {"machine": machine(torch.device("cpu")), "model": digest(demo.WEIGHTS), "figures": figures}
    save({**contents, "pictures": rows}, arguments.results / "caches.json")
    show(figures, pictures, arguments)


def parsed() -> Any:
    parser = Parser(__doc__)
    thresholds, distances, fewer = [0.03, 0.05, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5], [2, 3, 4, 6], [20, 14, 10, 7]
    parser.add_argument("--res", type=pixels, default=2 * demo.NATIVE_SIZE, help="of the pictures (512)")
    parser.add_argument("--steps", type=whole_number, default=28, help="of each picture (28)")
    parser.add_argument("--pictures", type=whole_number, default=6, help="drawn in each way (6)")
    parser.add_argument("--thresholds", type=float, nargs="+", default=thresholds, help="of first-block (0.03 to 0.5)")
    parser.add_argument("--distances", type=whole_number, nargs="+", default=distances, help="of taylor (2 3 4 6)")
    parser.add_argument("--fewer", type=whole_number, nargs="+", default=fewer, help="numbers of steps (20 14 10 7)")
    parser.add_argument("--drawn", type=Path, default=Path("fidelity/caches"), help="folder of what was drawn")
    parser.add_argument("--results", type=Path, default=Path("fidelity/caches"), help="folder of figures and plots")
    parser.add_argument("--page", type=Path, help="document whose table is replaced (none)")
    arguments = parser.parse_args()
    if find_spec("matplotlib") is None:
        parser.error("the curve needs matplotlib, which is missing; nearest: pip install -e '.[bench]'")
    try:
        settings = {"model": digest(demo.WEIGHTS), "res": arguments.res, "steps": arguments.steps}
        keep_settings(arguments.drawn, settings)
    except ValueError as error:
        parser.error(str(error))
    arguments.results.mkdir(parents=True, exist_ok=True)
    return arguments


def measured(way: Way, index: int, found: Cached, whole: Cached) -> dict[str, Any]:
    """Figures of a picture, and those of it in proportion to the one without a cache."""
    scores = likeness(as_bytes(found.timed.picture), as_bytes(whole.timed.picture))
    return {
        **{"way": way.title, "kind": way.kind, "number": way.number, "picture": index, "skipped": found.skipped},
        **{"psnr": min(scores.psnr[0], TOP), "ms_ssim": None if scores.ms_ssim is None else scores.ms_ssim[0]},
        **{"seconds": found.timed.seconds, "processor_seconds": found.timed.processor_seconds},
        "time": found.timed.processor_seconds / whole.timed.processor_seconds,
        "time_on_the_wall": found.timed.seconds / whole.timed.seconds,
        "blocks": found.blocks / whole.blocks,
    }


def figure(rows: list[dict[str, Any]], way: Way) -> Mapping[str, Any]:
    """Medians over pictures, and the worst picture's PSNR."""
    those = [row for row in rows if row["way"] == way.title]
    names = [name for name, value in those[0].items() if isinstance(value, float) and name != "number"]
    return {
        **{"way": way.title, "kind": way.kind, "number": way.number, "pictures": len(those)},
        "skipped": median(len(row["skipped"]) for row in those),
        "worst_psnr": min(row["psnr"] for row in those),
        **{name: median(row[name] for row in those) for name in names},
    }


if __name__ == "__main__":
    main()
