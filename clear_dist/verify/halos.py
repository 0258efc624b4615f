"""Whether every halo cell arrives from its owner: cells carry who they are, and expectations use no plan.

Shapes: B batch, R rows, W columns, N heads, M marks (in the place of the head dim).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.comm.halo_exchange import HaloExchange
from clear_dist.geometry import cut_in_stripes, plan_halos
from clear_dist.verify.finding import Finding, Subjects

RADII = (2, 8, 32, None)
"""2: a halo of one row; 8 and 32: several owners from three ranks on; None: full attention."""
BATCH, COLUMNS, HEADS = 2, 5, 2
TURNS = 3
"""The second exchange finds the first one's rows in its buffers."""
LARGEST_MARK = 251
"""Whole numbers below it are exact in bfloat16."""


def check_halos(group: Group, subjects: Subjects) -> Iterator[Finding]:
    """Stripes of two or three rows, so that some halos have several owners."""
    rows = 2 * group.size + 1
    for radius in RADII if group.size > 1 else ():
        for dtype in (torch.float32, torch.bfloat16):
            with uninitialised_memory_is_nan():
                plan = plan_halos(cut_in_stripes(rows, group.size), group.rank, radius)
                exchange = subjects.exchange(group, plan, Counters())
                yield _compare(group, exchange, rows, radius, dtype)


def _compare(group: Group, exchange: HaloExchange, rows: int, radius: int | None, dtype: torch.dtype) -> Finding:
    owners = [rank for rank in range(group.size) for _ in range(rows // group.size + (rank < rows % group.size))]
    mine = [row for row in range(rows) if owners[row] == group.rank]
    seen = [row for row in range(rows) if radius is None or any((row - own) ** 2 < radius**2 for own in mine)]
    sides = [row for row in seen if row < mine[0]], [row for row in seen if row > mine[-1]]
    wrong, faults = 0, []
    for turn in range(TURNS):
        key, value = (marked(mine, owners, 2 * turn + kind, dtype).to(group.device) for kind in (0, 1))
        pending = exchange.start(key, value)
        halos = pending.wait()
        for halo, side in zip(halos, sides, strict=True):
            expected = torch.stack([marked(side, owners, 2 * turn + kind, dtype) for kind in (0, 1)])
            count, fault = _wrong_rows(halo.cpu(), expected, side, owners)
            wrong += count
            faults += [f"exchange {turn + 1}: {fault}"] if fault else []
        pending.release()
    exchange.drain()
    cells = TURNS * 2 * BATCH * COLUMNS * HEADS * (len(seen) - len(mine))
    owners_seen = sorted({owners[row] for row in seen} - {group.rank})
    window = "full attention" if radius is None else f"radius {radius}"
    return Finding(
        name=f"halos, {window}, {str(dtype).removeprefix('torch.')}",
        error=wrong,
        figure=f"{cells} cells on rank {group.rank}, owned by {len(owners_seen)} other{'s' * (len(owners_seen) != 1)}",
        fault="; ".join(faults[:2]),
        details={"cells": cells, "rows_received": len(seen) - len(mine), "owners": owners_seen},
    )


def _wrong_rows(halo: Tensor, expected: Tensor, side: Sequence[int], owners: Sequence[int]) -> tuple[int, str]:
    """Count of wrong numbers, and place of the first; halos are [2, B, R, W, N, M]."""
    if halo.shape != expected.shape:
        return max(expected.numel(), 1), f"the halo must be {list(expected.shape)}, got {list(halo.shape)}"
    differs = halo != expected  # NaN does, too
    if not differs.any():
        return 0, ""
    first = differs.nonzero()[0]
    row, kind = side[int(first[2])], ("keys", "values")[int(first[0])]
    mark = ("owner", "row", "column", "batch", "head", "exchange")[int(first[-1])]
    got, right = halo[tuple(first)].item(), expected[tuple(first)].item()
    return int(differs.sum()), f"{kind} of row {row}, which is rank {owners[row]}'s: {mark} {got:g}, must be {right:g}"


def marked(rows: Sequence[int], owners: Sequence[int], mark: int, dtype: torch.dtype) -> Tensor:
    """[B, R, W, N, M]: owner, row, column, batch, head and `mark` of each cell."""
    shape = (BATCH, len(rows), COLUMNS, HEADS)
    batch, index, column, head = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
    numbers = torch.tensor(list(rows), dtype=torch.long)[index] if rows else index
    owner = torch.tensor([owners[row] for row in rows], dtype=torch.long)[index] if rows else index
    marks = [owner % LARGEST_MARK, numbers % LARGEST_MARK, column, batch, head, torch.full(shape, mark)]
    return torch.stack(marks, dim=-1).to(dtype)


@contextmanager
def uninitialised_memory_is_nan() -> Iterator[None]:
    """`torch.empty` returns NaN, so that a number nobody wrote is seen."""
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
