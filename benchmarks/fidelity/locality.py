"""Why does locality work, and which radius does a model need (Sec. 3.1, Fig. 4 and 5)?

    python -m benchmarks.fidelity.locality --results locality
    python -m benchmarks.fidelity.locality --model FOLDER --clear-weights clear_local_4.safetensors --results locality

Records where image queries look, in each layer and head and at some steps, and draws the same prompts from the same
noise with relative positions in rotary embedding clipped to a radius (remote features perturbed) or raised to it (local
ones perturbed), with that window and no distilling, and with the CLEAR files. Pictures are compared with those of full
attention: PSNR and SSIM, medians, and how often they show what was asked for. What has been drawn is kept, so that an
interrupted run goes on. Writes locality.json, .csv (each layer and head), .md, .png, maps.png and pictures.png.
"""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import clear_dist
from benchmarks.fidelity import stock
from benchmarks.fidelity.kept import FULL, digest, held_out_prompts, keep_settings, weights_by_name
from benchmarks.fidelity.locality_shown import contact_sheet, plot, plot_maps, table
from benchmarks.fidelity.perturbed import Perturbed
from benchmarks.fidelity.shares import Look, Recorder, together, uniform
from benchmarks.lib.counts import TOKEN
from benchmarks.lib.flags import Parser, pixels, whole_number
from benchmarks.lib.machine import machine, save
from clear_dist import demo
from clear_dist.cards.clear import radius_of
from clear_dist.comm.group import Group
from clear_dist.evaluate.attributes import accuracy
from clear_dist.evaluate.scores import likeness
from clear_dist.families.flux.card import CARD
from clear_dist.pictures import replacing
from clear_dist.training.attention import Pattern
from clear_dist.training.student import Student, seeing_layers
from clear_dist.weights.loading import load_pipeline

TOGETHER = 8
"""Pictures drawn at once."""
IDENTICAL = 110.0
"""dB of two equal pictures."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to draw: full attention, rotary distances clipped or raised, a window, CLEAR weights."""

    kind: str
    radius: int | None = None
    weights: Path | None = None

    @property
    def name(self) -> str:
        if self.weights is not None:
            return self.weights.stem
        return self.kind if self.radius is None else f"{self.kind}_{self.radius}"


def ways(radii: Sequence[int], files: Sequence[Path]) -> Iterator[Way]:
    yield Way(kind=FULL)
    for kind in ("clipped", "raised", "window"):
        for radius in radii:
            yield Way(kind=kind, radius=radius)
    for file in files:
        yield Way(kind="distilled", radius=radius_of(file), weights=file)


def main() -> None:
    arguments = parsed()
    group = Group.create("cuda" if torch.cuda.is_available() else "cpu")
    looks, names = recorded(arguments, group)
    rows: list[dict[str, Any]] = []
    drawn: dict[str, np.ndarray] = {}
    for way in ways(arguments.radii, arguments.clear_weights):
        drawn[way.name] = pictures_of(way, arguments, group)
        rows.append({"kind": way.kind, "radius": way.radius, "name": way.name, **scores(drawn, way.name, arguments)})
        print(f"{way.name}: {rows[-1]['psnr']:.1f} dB, {rows[-1].get('all', 0):.3f} of attributes", flush=True)
    group.close()
    write(looks, names, rows, arguments)
    plot(looks, names, arguments.side, arguments.results / "locality.png")
    plot_maps(looks, names, arguments.side, arguments.results / "maps.png")
    contact_sheet(drawn, rows, held_out_prompts(arguments.prompts), arguments.results / "pictures.png")
    print((arguments.results / "locality.md").read_text())


def parsed() -> Any:
    parser = Parser(__doc__)
    parser.add_argument("--model", type=Path, default=demo.WEIGHTS, help="a FLUX pipeline's folder (the embedded)")
    parser.add_argument("--clear-weights", type=Path, nargs="+", default=[], help="files distilled from it (none)")
    parser.add_argument("--results", type=Path, default=Path("locality"), help="tables, plots and what was drawn")
    parser.add_argument("--res", type=pixels, default=demo.NATIVE_SIZE, help="side of the pictures (the demo's)")
    parser.add_argument("--radii", type=whole_number, nargs="+", default=[1, 2, 4, 8], help="in tokens (1 2 4 8)")
    parser.add_argument("--prompts", type=whole_number, default=8, help="held-out captions (8)")
    parser.add_argument("--seeds", type=whole_number, default=2, help="pictures of each (2)")
    parser.add_argument("--steps", type=whole_number, default=demo.DEFAULT_STEPS, help="of drawing (20)")
    parser.add_argument("--moments", type=whole_number, default=4, help="steps that are recorded, evenly spaced (4)")
    arguments = parser.parse_args()
    arguments.side = arguments.res // TOKEN
    try:
        named = weights_by_name(arguments.clear_weights)
        settings = {name: getattr(arguments, name) for name in ("res", "prompts", "seeds", "steps", "moments")}
        digests = {name: digest(file) for name, file in {"model": arguments.model, **named}.items()}
        keep_settings(arguments.results, settings | digests)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def loaded(arguments: Any, group: Group) -> Any:
    return load_pipeline(arguments.model, CARD, with_text_encoders=True, dtype=torch.float32, device=group.device)


def drawing(pipe: Any, arguments: Any, begin: Any = lambda: None) -> np.ndarray:
    """Bytes [seeds x prompts, H, W, 3], all prompts in turn, picture i from the noise of seed i; by stock diffusers."""
    captions = held_out_prompts(arguments.prompts) * arguments.seeds
    pictures = []
    for first in range(0, len(captions), TOGETHER):
        begin()
        batch = captions[first : first + TOGETHER]
        pictures.append(stock.drawn(pipe, batch, res=arguments.res, steps=arguments.steps, first_seed=first))
    return np.concatenate(pictures)


def with_pattern(pipe: Any, pattern: Pattern, side: int) -> Any:
    Student.of(pipe.transformer, pattern, (side, side))
    return pipe


def recorded(arguments: Any, group: Group) -> tuple[dict[tuple[int, int], Look], list[str]]:
    """Where queries look, by step and layer, and the layers' names; pictures of full attention on the way."""
    file, pipe = arguments.results / "looks.pt", loaded(arguments, group)
    if not file.exists():
        steps = frozenset(moments(arguments.steps, arguments.moments))
        recorder = Recorder(steps=steps, passes=2 if demo.DEFAULT_TRUE_CFG_SCALE > 1 else 1)
        pictures = drawing(with_pattern(pipe, recorder, arguments.side), arguments, recorder.begin)
        keep(pictures, arguments.results / "drawn" / f"{FULL}.npy")
        looks = {place: together(each) for place, each in recorder.looks.items()}
        with replacing(file) as partial:
            torch.save({place: (each.text, each.offsets) for place, each in looks.items()}, partial)
    read = torch.load(file, weights_only=True)
    names = [short(name) for name in seeing_layers(pipe.transformer)]
    return {place: Look(text=text, offsets=offsets) for place, (text, offsets) in read.items()}, names


def short(layer: str) -> str:
    """Such as `double 0` and `single 3`, of FLUX's two kinds of blocks."""
    block, number, _ = layer.split(".")
    return f"{'single' if block.startswith('single') else 'double'} {number}"


def moments(steps: int, count: int) -> list[int]:
    """Up to `count` of a loop's steps, evenly spaced, with the first and the last."""
    return sorted({round(each) for each in np.linspace(0, steps - 1, count)})


def pictures_of(way: Way, arguments: Any, group: Group) -> np.ndarray:
    file = arguments.results / "drawn" / f"{way.name}.npy"
    if not file.exists():
        pipe = loaded(arguments, group)
        if way.kind in ("clipped", "raised"):
            with_pattern(pipe, Perturbed.by(way.kind, way.radius, pipe.transformer.pos_embed), arguments.side)
        elif way.kind != FULL:
            window = None if way.weights is not None else way.radius
            clear_dist.parallelize(pipe, group=group, window=window, clear_weights=way.weights, text_attention="exact")
        keep(drawing(pipe, arguments), file)
    return np.load(file)


def keep(pictures: np.ndarray, file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    with replacing(file) as partial, partial.open("wb") as stream:
        np.save(stream, pictures)


def scores(drawn: dict[str, np.ndarray], name: str, arguments: Any) -> dict[str, float]:
    """Medians against full attention, and the share of attributes that pictures show."""
    pictures, reference = (torch.from_numpy(drawn[each]) for each in (name, FULL))
    found = likeness(pictures, reference)
    shown = accuracy(pictures, held_out_prompts(arguments.prompts) * arguments.seeds)
    return {"psnr": median(min(each, IDENTICAL) for each in found.psnr), "ssim": median(found.ssim), **shown}


def write(looks: dict[tuple[int, int], Look], names: list[str], rows: list[dict[str, Any]], arguments: Any) -> None:
    """`locality.csv` has a line for each step, layer and head; `locality.json` that and the pictures' scores."""
    side = arguments.side
    radii = range(1, 2 * side)
    chance = {radius: float(uniform(side, side).within(radius)) for radius in radii}
    heads = [
        {"step": step, "layer": names[layer], "head": head, "text": round(float(look.text[head]), 5)}
        | {f"r={radius}": round(float(share[head]), 5) for radius, share in shares.items()}
        for (step, layer), look in sorted(looks.items())
        for shares in [{radius: look.within(radius) for radius in radii}]
        for head in range(len(look.text))
    ]
    contents = {"machine": machine(torch.device("cpu")), "tokens": [side, side], "uniform": chance, "heads": heads}
    save(
        {**contents, "prompts": held_out_prompts(arguments.prompts), "pictures": rows},
        arguments.results / "locality.json",
    )
    with replacing(arguments.results / "locality.csv") as partial, partial.open("w", newline="") as stream:
        lines = csv.DictWriter(stream, heads[0])
        lines.writeheader()
        lines.writerows(heads)
    with replacing(arguments.results / "locality.md") as partial:
        partial.write_text(table(looks, names, rows, side))


if __name__ == "__main__":
    main()
