"""A plan for people: tables, and the verdict."""

from collections.abc import Iterator

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from clear_dist.plan.asked import PlanRequest
from clear_dist.plan.fits import ERROR, Change, Plan
from clear_dist.plan.phases import Phase, RankMemory
from clear_dist.plan.timing import assumptions

GB = 1e9
LEAST_SHOWN = 5e6
"""Bytes of an item that has a line of its own."""


def show_plan(console: Console, plan: Plan, nearest: Change | None) -> None:
    """One plan."""
    for line in _request(plan.asked):
        _say(console, line)
    console.print(_memory(plan), *_times(plan))
    for line in (*_bytes(plan), *_pinned(plan), *_assumptions(plan.asked)):
        _say(console, line)
    words, style = _verdict(plan, nearest)
    _say(console, words, style=style)


def show_sweep(console: Console, plans: list[Plan]) -> None:
    """Plans of one request for several numbers of ranks."""
    columns = ("ranks", "stripes of", "GB per rank", "fits", "GB sent a step", "s a step", "s in all", "faster")
    table = Table(*columns, box=SIMPLE)
    first = plans[0].seconds
    for plan in plans:
        seconds = plan.seconds
        table.add_row(
            str(plan.asked.ranks),
            _stripes_of(plan.asked),
            f"{plan.highest / GB:.1f}",
            Text("yes", style="green") if plan.fits else Text("no", style="red"),
            f"{plan.traffic.sent / GB:.2f}",
            _seconds(plan.times[-1].step if plan.times else None),
            _seconds(seconds),
            f"{first / seconds:.1f}" if first and seconds else "-",
        )
    _say(console, next(_title(plans[0].asked)))
    console.print(table)
    for line in _assumptions(plans[0].asked):
        _say(console, line)


def _say(console: Console, words: str, style: str = "") -> None:
    """A line, however long: terminals break it, programs need not join it."""
    console.print(Text(words, style=style), soft_wrap=True)


def _title(asked: PlanRequest) -> Iterator[str]:
    request = asked.request
    where = "CPU" if asked.gpu is None else f"{asked.gpu.name}, {asked.link.name}"
    window = "full attention" if request.window == "full" else f"radius {request.window}"
    images = f", {request.images_at_once} pictures at once" if request.images_at_once > 1 else ""
    if request.down_factor > 1 and request.window != "full":
        window += f" and keys of {request.down_factor}x{request.down_factor} tokens"
    yield f"{asked.model.name}, {request.width}x{request.height} px, {window}, {request.dtype}{images} on {where}"


def _stripes_of(asked: PlanRequest) -> str:
    """What a stripe of the last stage is: rows or columns of tokens."""
    image = asked.striping(asked.stages[-1])
    return f"{'-'.join(map(str, sorted(set(map(len, image.stripes)))))} {image.lines}"


def _request(asked: PlanRequest) -> Iterator[str]:
    yield from _title(asked)
    if len(asked.stages) > 1:
        yield f"cascade: {' -> '.join(f'{stage.width}x{stage.height}' for stage in asked.stages)}"
    image, part = asked.striping(asked.stages[-1]), max(asked.parts[-1], key=lambda part: part.received)
    lines, counts = image.lines, list(map(len, image.stripes))
    some = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else str(counts[0])
    across = f"{image.width} {'high' if image.by_columns else 'wide'}"
    halos = f"; at most {part.received} {lines} of halo for {part.rows} of one's own" if part.received else ""
    if asked.request.data_ranks > 1:
        yield f"groups: {asked.request.data_ranks} of {asked.ranks} ranks, which draw different pictures"
    if halves := [stage for stage in asked.stages if asked.has_halves(stage)]:
        where = "" if len(halves) == len(asked.stages) else f" at {', '.join(f'{x.width}x{x.height}' for x in halves)}"
        yield f"guidance: each half of {asked.ranks} ranks takes one of two predictions{where}"
    yield f"stripes: {len(counts)} of {some} of the {sum(counts)} {lines} of tokens, {across}{halos}"


def _memory(plan: Plan) -> Table:
    """The rank that needs most: its phases before anything is drawn, and in the stage where it needs most."""
    memory = plan.largest
    phases = [phase for phase in memory.phases if phase.stage in (-1, memory.drawing.stage)]
    title = f"rank {memory.rank}, GB{_of_stage(plan, memory)}"
    table = Table("", *(phase.name for phase in phases), title=title, title_justify="left", title_style="", box=SIMPLE)
    names = list(dict.fromkeys(name for phase in (memory.drawing, *phases) for name in phase.items))
    for name in names:
        if max(phase.items.get(name, 0) for phase in phases) >= LEAST_SHOWN or len(names) < 2:
            table.add_row(name, *(_gb(phase.items.get(name)) for phase in phases))
    table.add_section()
    table.add_row("together", *(_total(phase, memory) for phase in phases), style="bold")
    others = [other.peak for other in plan.ranks if other.rank != memory.rank]
    if others:
        table.caption = f"the other ranks: {_range([f'{peak / GB:.1f}' for peak in sorted(others)])} GB at their peak"
        table.caption_justify, table.caption_style = "left", ""
    return table


def _of_stage(plan: Plan, memory: RankMemory) -> str:
    stages, number = plan.asked.stages, memory.drawing.stage
    return f", at {stages[number].width}x{stages[number].height}" if len(stages) > 1 else ""


def _total(phase: Phase, memory: RankMemory) -> Text:
    return Text(f"{phase.total / GB:.2f}", style="yellow" if phase is memory.largest else "")


def _times(plan: Plan) -> Iterator[Table]:
    if not plan.times:
        return
    columns = ("stage", "ranks", "steps", "s a step", "waiting", "encode", "decode", "in all")
    table = Table(*columns, box=SIMPLE)
    for stage, parts, time in zip(plan.asked.stages, plan.asked.parts, plan.times, strict=True):
        waiting = f"{time.exposed / time.step:.0%}"
        seconds = map(_seconds, (time.encode, time.decode, time.total))
        size, ranks = f"{stage.width}x{stage.height}", str(len(parts))
        table.add_row(size, ranks, str(time.steps), _seconds(time.step), waiting, *seconds)
    table.add_row("all, about", *[""] * 6, _seconds(plan.seconds), style="bold")
    yield table


def _bytes(plan: Plan) -> Iterator[str]:
    sent = plan.traffic
    if sent.ranks > 1:
        amounts = {
            "halos": sent.halos_sent,
            "pooled keys": sent.pooled_sent,
            "text": sent.text_gathered + sent.text_reduced,
            "weights": sent.weights_sent,
            "join": sent.join,
            "clean latents": sent.clean * (sent.everyone > 1),
        }
        listed = ", ".join(f"{name} {amount / GB:.3g} GB" for name, amount in amounts.items() if amount)
        yield f"sent per step and rank, in the last stage: {listed}"


def _pinned(plan: Plan) -> Iterator[str]:
    pinned = plan.memory.pinned
    if pinned:
        yield f"in pinned host memory: {pinned / GB:.1f} GB of modulation, for all ranks together"


def _assumptions(asked: PlanRequest) -> Iterator[str]:
    return (f"assumed: {line}" for line in assumptions(asked))


def _verdict(plan: Plan, nearest: Change | None) -> tuple[str, str]:
    """Words and their colour."""
    ranks = f" for {plan.room.sharing} ranks" if plan.room.sharing > 1 else ""
    amounts = f"{plan.needed / GB:.1f} of the {plan.room.bytes / GB:.1f} GB of {plan.room.where}{ranks}"
    if not plan.fits:
        more = (plan.needed - plan.room.bytes) / GB
        settings = "nothing that plan knows of" if nearest is None else nearest.flags
        return f"does not fit: it needs {amounts}, {more:.1f} GB too much; nearest: {settings}", "bold red"
    if plan.needed * (1 + ERROR) > plan.room.bytes:
        return f"fits narrowly: it needs {amounts}, and may need {ERROR:.0%} more", "bold yellow"
    return f"fits: it needs {amounts}", "bold green"


def _gb(amount: int | None) -> str:
    return "" if amount is None else f"{amount / GB:.2f}"


def _range(shown: list[str]) -> str:
    return shown[0] if shown[0] == shown[-1] else f"{shown[0]} to {shown[-1]}"


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.0f}" if seconds >= 100 else f"{seconds:.3g}" if seconds else ""
