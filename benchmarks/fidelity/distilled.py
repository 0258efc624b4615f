"""What distilled files give a model: how often its pictures show what held-out captions ask for.

    python -m benchmarks.fidelity.distilled --results distilled
    python -m benchmarks.fidelity.distilled demo-r4/clear_local_4.safetensors --prompts 64 --results distilled
    python -m benchmarks.fidelity.distilled --model FOLDER --full-alone --results first_version

Draws the same prompts from the same noise with full attention, with each file's window before it was distilled, and
with the file. Beside them stand the renderer's own pictures of these landscapes. The attributes are read from pixels
by a network that has seen renders alone (evaluate/attributes.py). What has been drawn is kept, so that an interrupted
run goes on. Writes distilled.json and .md.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import clear_dist
from benchmarks.fidelity import stock
from benchmarks.fidelity.kept import FULL, digest, held_out_prompts, keep_settings, weights_by_name
from benchmarks.lib.flags import Parser, pixels, whole_number
from benchmarks.lib.machine import machine, save
from clear_dist import demo
from clear_dist.cards.clear import radius_of
from clear_dist.comm.group import Group
from clear_dist.demo.data import HELD_OUT_SEED, scene
from clear_dist.evaluate.attributes import accuracy
from clear_dist.evaluate.scores import likeness
from clear_dist.families.flux.card import CARD
from clear_dist.pictures import replacing
from clear_dist.weights.loading import load_pipeline

CPU = torch.device("cpu")
TOGETHER = 8
"""Pictures drawn at once."""
RENDERED = "renderer"


@dataclass(frozen=True, kw_only=True)
class Way:
    """Full attention, a window that nothing was distilled for, or a CLEAR file."""

    name: str
    radius: int | None = None
    weights: Path | None = None


def ways(files: dict[str, Path]) -> Iterator[Way]:
    yield Way(name=FULL)
    for radius in sorted({radius_of(file) for file in files.values()}, reverse=True):
        yield Way(name=f"r = {radius} before", radius=radius)
    for name, file in files.items():
        yield Way(name=name, weights=file)


def main() -> None:
    arguments = parsed()
    prompts = held_out_prompts(arguments.prompts)
    pictures = {RENDERED: rendered(arguments)}
    group = Group.create(CPU)
    rows: list[dict[str, Any]] = []
    for name in (RENDERED, *(way.name for way in arguments.ways)):
        if name != RENDERED:
            pictures[name] = drawn(next(way for way in arguments.ways if way.name == name), prompts, arguments, group)
        rows.append({"name": name, **scores(pictures, name, prompts)})
        print(name, {word: round(value, 3) for word, value in rows[-1].items() if word != "name"}, flush=True)
        write(rows, arguments)
    group.close()


def parsed() -> Any:
    parser = Parser(__doc__)
    parser.add_argument("files", type=Path, nargs="*", help="CLEAR files (the embedded model's own)")
    parser.add_argument("--model", type=Path, default=demo.WEIGHTS, help="a FLUX pipeline's folder (the embedded)")
    parser.add_argument("--full-alone", action="store_true", help="full attention and no file")
    parser.add_argument("--prompts", type=whole_number, default=256, help="held-out captions (256)")
    parser.add_argument("--res", type=pixels, default=demo.NATIVE_SIZE, help="side of the pictures (the demo's)")
    parser.add_argument("--steps", type=whole_number, default=demo.DEFAULT_STEPS, help="of drawing (20)")
    parser.add_argument("--results", type=Path, default=Path("distilled"), help="figures, and what was drawn")
    arguments = parser.parse_args()
    files = arguments.files or sorted(arguments.model.glob("clear_local_*.safetensors"))
    try:
        named = weights_by_name([] if arguments.full_alone else files)
        digests = {name: digest(file) for name, file in {FULL: arguments.model, **named}.items()}
        settings = {name: getattr(arguments, name) for name in ("prompts", "res", "steps")}
        keep_settings(arguments.results, settings | digests)
    except ValueError as error:
        parser.error(str(error))
    arguments.ways = list(ways(named))
    return arguments


def rendered(arguments: Any) -> np.ndarray:
    """Renders of the held-out landscapes, bytes [prompts, H, W, 3]."""
    return np.stack([scene(HELD_OUT_SEED + index, arguments.res)[1] for index in range(arguments.prompts)])


def drawn(way: Way, prompts: list[str], arguments: Any, group: Group) -> np.ndarray:
    """Bytes [prompts, H, W, 3], picture i from the noise of seed i."""
    folder = arguments.results / "drawn" / way.name.replace(" = ", "_").replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    pipe, parts = None, []
    for first in range(0, len(prompts), TOGETHER):
        file = folder / f"{first:05}.npy"
        if not file.exists():
            pipe = pipe or prepared(way, arguments, group)
            batch = prompts[first : first + TOGETHER]
            found = stock.drawn(pipe, batch, res=arguments.res, steps=arguments.steps, first_seed=first)
            with replacing(file) as partial, partial.open("wb") as stream:
                np.save(stream, found)
        parts.append(np.load(file))
    return np.concatenate(parts)


def prepared(way: Way, arguments: Any, group: Group) -> Any:
    pipe = load_pipeline(arguments.model, CARD, with_text_encoders=True, dtype=torch.float32, device=CPU)
    pipe.set_progress_bar_config(disable=True)
    if way.name != FULL:
        clear_dist.parallelize(pipe, group=group, window=way.radius, clear_weights=way.weights, text_attention="exact")
    return pipe


def scores(pictures: dict[str, np.ndarray], name: str, prompts: list[str]) -> dict[str, float]:
    """Share of attributes shown, each and all, and the median PSNR in dB to full attention's pictures."""
    shown = accuracy(torch.from_numpy(pictures[name]), prompts)
    if name in (RENDERED, FULL):
        return shown
    found = likeness(torch.from_numpy(pictures[name]), torch.from_numpy(pictures[FULL]))
    return {**shown, "psnr_to_full": median(found.psnr)}


def write(rows: list[dict[str, Any]], arguments: Any) -> None:
    contents = {
        "machine": machine(CPU),
        "settings": json.loads((arguments.results / "settings.json").read_text()),
        "rows": rows,
    }
    save(contents, arguments.results / "distilled.json")
    with replacing(arguments.results / "distilled.md") as partial:
        partial.write_text(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row for each way to draw, a column for each attribute."""
    words = [word for word in rows[0] if word not in ("name", "all", "psnr_to_full")]
    lines = [["", "all", *words, "PSNR to full attention's"], ["---"] * (len(words) + 3)]
    for row in rows:
        to_full = f"{row['psnr_to_full']:.1f} dB" if "psnr_to_full" in row else ""
        shown = [f"{100 * row[word]:.1f} %" if word in row else "" for word in ("all", *words)]
        lines.append([row["name"], *shown, to_full])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    main()
