"""The parts of suite.py that measure how fast a GPU is: kernels, steps and profile."""

import gzip
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor

from benchmarks.gpu.session import Session, first_line
from benchmarks.lib.baselines import stock
from benchmarks.lib.counts import FLUX, TOKEN, Model, Part, attention_work, middle_part
from benchmarks.lib.layer import Layer, full, interleaved, make_layer, row_major, window
from benchmarks.lib.planned import planned_bytes
from benchmarks.lib.row_major import RowMajorProcessor, row_major_mask
from benchmarks.lib.share import on_stripes, share_of
from benchmarks.lib.steps import SMALL, Candidate, draw, make_pipeline, peak_rate
from benchmarks.lib.steps import interleaved as interleaved_steps
from benchmarks.lib.tables import TERA, Limits, Setting, cell_of, free_bytes
from benchmarks.speed.backends import row_of
from clear_dist.attention import BACKENDS, attend
from clear_dist.comm.group import Group
from clear_dist.observe.peaks import peak_memory, reset_peak_memory
from clear_dist.observe.profiling import RECORDED_STEPS, Profile
from clear_dist.options import Options

SIDES, SMALL_SIDES = (8192, 4096, 2048, 1024), (256, 128)
SIDES_OF_STEPS = (2048, 8192, 1024, 4096)
"""The first predicts the time of the next; the last may find no time."""
RADII, RANKS = (16, 8, 32), 8
"""The paper's own radius first, as time may run out."""
REPETITIONS = 3
LARGE = 4096
"""Pixels from which on a step takes seconds and is timed once."""
SECONDS_OF_A_GEOMETRY = {"cuda": 15.0, "cpu": 1.0}
"""Rough seconds of `kernels` for a side and radius, compiling included."""
LISTED_KERNELS = 40
OURS = "CLEAR, "
"""Prefix of the engine's kernels."""
Prepare = Callable[[], AbstractContextManager[FluxPipeline]]


def model_of(session: Session) -> Model:
    return replace(SMALL if session.small else FLUX, itemsize=session.dtype.itemsize)


def sides_of(session: Session) -> tuple[int, ...]:
    return SMALL_SIDES if session.small else SIDES


def kernels(session: Session) -> None:
    """Time one layer's attention with text queries; NATTEN's is without text, and on squares instead of circles."""
    model = model_of(session)
    session.journal.tell(what="a large matrix product", tflops=peak_rate(session.device, session.dtype) / TERA)
    for side, radius in product(sides_of(session), RADII):
        if session.seconds_left < SECONDS_OF_A_GEOMETRY[session.device.type]:
            session.journal.tell(side_px=side, radius=radius, note="skipped: no time is left")
            continue
        layer = make_layer(
            side // TOKEN,
            text=model.text_tokens,
            heads=model.heads,
            head_dim=model.head_dim,
            dtype=session.dtype,
            device=session.device,
        )
        with torch.inference_mode():
            time_kernels(layer, side, radius, model, session)


def time_kernels(layer: Layer, side: int, radius: int, model: Model, session: Session) -> None:
    runnable: dict[str, Callable[[], Any]] = {}
    memory: dict[str, int] = {}
    for name, make in kernel_candidates(layer, radius, session).items():
        try:
            candidate = make()
            candidate()  # compiles
            reset_peak_memory(session.device)
            candidate()
        except Exception as error:
            session.journal.tell(side_px=side, radius=radius, candidate=name, note=first_line(error))
        else:
            runnable[name], memory[name] = candidate, peak_memory(session.device)
    times = dict(zip(runnable, interleaved(list(runnable.values()), REPETITIONS), strict=True))
    for name, seconds in times.items():
        seen = middle_part(side, 1, "full" if name == "SDPA" else radius)
        work = attention_work(model, seen) / model.layers
        row = {"side_px": side, "radius": radius, "candidate": name, "seconds": seconds}
        if name not in ("text queries", "NATTEN"):  # these do a part of the work
            row["wanted_tflops"] = work / seconds / TERA
        session.journal.tell(**row, peak_bytes=memory[name])
    ours = {name.removeprefix(OURS): seconds for name, seconds in times.items() if name.startswith(OURS)}
    if ours:
        session.journal.tell(**row_of(layer.request(radius), ours))


def kernel_candidates(layer: Layer, radius: int, session: Session) -> dict[str, Callable[[], Callable[[], Any]]]:
    """Makers of candidates by name; a maker raises where its candidate cannot run."""

    def clear(name: str) -> Callable[[], Tensor]:
        if reason := BACKENDS[name].why_not_here(layer.request(radius)):
            raise ValueError(reason)
        return lambda: window(layer, radius, BACKENDS[name])

    def natten() -> Callable[[], Tensor]:
        from natten import na2d

        query, key, value = (layer.split(x)[1] for x in (layer.query, layer.key, layer.value))
        return lambda: na2d(query, key, value, kernel_size=2 * radius - 1)

    text = layer.split(layer.query)[0]
    candidates: dict[str, Callable[[], Callable[[], Any]]] = {
        OURS + name: partial(clear, name) for name in BACKENDS if name != "reference"
    }
    candidates["text queries"] = lambda: lambda: attend(text, layer.key, layer.value)
    if session.device.type == "cuda":  # a CPU compiles for half a minute
        candidates["row-major FlexAttention"] = lambda: row_major(layer, radius)
    candidates["NATTEN"] = natten
    if radius == RADII[0]:
        candidates["SDPA"] = lambda: lambda: full(layer)
    return candidates


@dataclass(frozen=True, kw_only=True)
class Step:
    """One way of computing a rank's step."""

    name: str
    part: Part
    prepare: Prepare


def steps(session: Session) -> None:
    """Time whole steps, the official layout in diffusers' pipeline, one rank's share of 8, matrix products alone."""
    model, device = model_of(session), session.device
    pipe = make_pipeline(model, device, session.dtype)
    stock_pipe = stock(pipe, compile=session.compile)
    group = Group.create(device)
    peak = peak_rate(device, session.dtype)
    session.journal.tell(what="a large matrix product", tflops=peak / TERA)
    limits = Limits(model, 0.0, REPETITIONS, peak, free_bytes(device))
    for side in SMALL_SIDES if session.small else SIDES_OF_STEPS:
        limits.repetitions = 1 if side >= LARGE else REPETITIONS
        products = seconds_of_products(model, (side // TOKEN) ** 2 + model.text_tokens, session)
        session.journal.tell(side_px=side, candidate="matrix products with weights alone", seconds=[products])
        chosen, left = [], session.seconds_left - products
        for step in steps_of(side, pipe, stock_pipe, group, session):
            limits.seconds = left
            setting = Setting(name=step.name, window=step.part.window)
            reason = limits.why_not(setting, step.part, steps=2)
            if reason is None:
                chosen.append(step)
                left -= limits.predicted_seconds(step.part, 2)
            else:
                session.journal.tell(side_px=side, candidate=step.name, note=f"skipped, {reason[0]}: {reason[1]}")
        tell_steps(side, chosen, group, limits, session)
    group.close()


def steps_of(side: int, pipe: FluxPipeline, stock_pipe: FluxPipeline, group: Group, session: Session) -> Iterator[Step]:
    """The most telling first, as time may run out."""
    whole = {radius: middle_part(side, 1, radius) for radius in RADII}
    ours = partial(on_stripes, pipe, schedule="sync", group=group, **session.settings)
    first = RADII[0]
    yield Step(name=f"CLEAR r = {first}", part=whole[first], prepare=partial(ours, window=first))
    for radius in RADII:
        part = middle_part(side, RANKS, radius)
        share = partial(share_of, pipe, part, "sync", model_of(session).text_tokens, **session.settings)
        yield Step(name=f"CLEAR r = {radius}, share of {RANKS}", part=part, prepare=share)
    hoisted = partial(ours, window=first, hoist_modulation=True)
    yield Step(name=f"CLEAR r = {first}, hoisted modulation", part=whole[first], prepare=hoisted)
    if session.device.type == "cuda":  # a CPU compiles for half a minute
        official = partial(on_row_major, pipe, side, model_of(session).text_tokens, first)
        yield Step(name=f"row-major r = {first}", part=whole[first], prepare=official)
    for radius in RADII[1:]:
        yield Step(name=f"CLEAR r = {radius}", part=whole[radius], prepare=partial(ours, window=radius))
    yield Step(name="full attention", part=middle_part(side, 1, "full"), prepare=lambda: nullcontext(stock_pipe))


def tell_steps(side: int, chosen: list[Step], group: Group, limits: Limits, session: Session) -> None:
    candidates = [Candidate(prepare=step.prepare, side=side) for step in chosen]
    found = interleaved_steps(candidates, group, limits.model.text_tokens, limits.repetitions)
    for step, runs in zip(chosen, found, strict=True):
        window, number = step.part.window, step.part.ranks
        cell = cell_of(Setting(name=step.name, window=window), side, number, runs, limits.model)
        if step.name.startswith(("CLEAR", "full")) and number == 1:
            limits.learn(window, cell)
        row: dict[str, Any] = {"side_px": side, "candidate": step.name, "seconds": cell.seconds}
        if cell.rate is not None:
            row |= {"tflops": cell.rate / TERA, "of_peak": cell.rate / limits.peak_rate, "peak_bytes": cell.peak_bytes}
        if step.name.startswith("CLEAR") and number == 1:  # a share has no halos
            hoisted = step.name.endswith("hoisted modulation")
            options = Options(attention_backend=session.backend, hoist_modulation=hoisted)
            row["planned_bytes"] = planned_bytes(limits.model, step.part, options, device_type=session.device.type)
        session.journal.tell(**row, **({"note": cell.note} if cell.note else {}))


@contextmanager
def on_row_major(pipe: FluxPipeline, side: int, text: int, radius: int) -> Iterator[FluxPipeline]:
    """Context in which `pipe` is diffusers' own with the official code's attention."""
    transformer = pipe.transformer
    tokens, stock = side // TOKEN, dict(transformer.attn_processors)
    mask = row_major_mask((tokens, tokens), text, radius, transformer.device)
    transformer.set_attn_processor(RowMajorProcessor(mask))
    try:
        yield pipe
    finally:
        transformer.set_attn_processor(stock)


def seconds_of_products(model: Model, tokens: int, session: Session) -> float:
    """Seconds of a step's matrix products with weights: those of one block times the number of blocks."""
    wide = 4 * model.channels
    made = {"device": session.device, "dtype": session.dtype}
    x, hidden = torch.randn(tokens, model.channels, **made), torch.randn(tokens, wide, **made)
    shapes = (model.channels, model.channels), (model.channels, wide), (wide, model.channels)
    square, up, down = (torch.randn(shape, **made) for shape in shapes)

    def block() -> None:
        for _ in range(4):  # queries, keys, values, output
            x @ square
        x @ up
        hidden @ down

    with torch.inference_mode():
        return model.layers * interleaved([block], REPETITIONS)[0]


def profile(session: Session) -> None:
    """Profile a step: the longest kernels as rows, and a trace."""
    model, side = model_of(session), sides_of(session)[-2]
    pipe = make_pipeline(model, session.device, session.dtype)
    group = Group.create(session.device)
    file = session.folder / "trace.json.gz"
    number = RECORDED_STEPS + 2
    with on_stripes(pipe, RADII[0], "sync", group, **session.settings):
        recorder = Profile(file, 0, steps=number, drain=lambda: None)
        with recorder.recording():
            draw(pipe, model.text_tokens, side, number, recorder.after_step)
        recorder.write()
    group.close()
    found = longest(json.loads(gzip.decompress(file.read_bytes())), session.device)
    for row in found or [{"note": "no kernels are in the trace: the driver gives them to no profiler (CUPTI)"}]:
        session.journal.tell(side_px=side, radius=RADII[0], **row)


def longest(trace: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
    """The longest kernels; on a CPU the longest operations, nested ones included."""
    kind = "kernel" if device.type == "cuda" else "cpu_op"
    spent: dict[str, list[float]] = defaultdict(list)
    for event in trace["traceEvents"]:
        if event.get("cat") == kind:
            spent[event["name"][:120]].append(event["dur"])
    ordered = sorted(spent.items(), key=lambda item: -sum(item[1]))[:LISTED_KERNELS]
    return [
        {"ms_per_step": sum(times) / 1e3 / RECORDED_STEPS, "calls_per_step": len(times) / RECORDED_STEPS, "name": name}
        for name, times in ordered
    ]
