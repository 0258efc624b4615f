"""A list on several ranks: what rank 0 finds done is skipped by all, what fails there is told, the others are drawn."""

import errno
import io
from contextlib import redirect_stderr

import pytest

from clear_dist.comm.group import Group
from clear_dist.drawing.many import ItemFailed, Outcome, alike, draw_each
from tests.ranks import run_ranks


def draw_five(group: Group) -> tuple[Outcome, list[int], list[str]]:
    """Rank 0 has the second, and cannot read the fourth; a word of rank 0's is in each that is drawn; lines told."""
    heard: list[int] = []

    def draw(index: int) -> None:
        with alike(group):
            if index == 3 and group.rank == 0:
                raise OSError(errno.ENOSPC, "No space left on device", "x-3.png")
        heard.append(group.broadcast_object(index if group.rank == 0 else None))

    with redirect_stderr(io.StringIO()) as told:
        outcome = draw_each(5, draw, group=group, is_there=lambda index: index == 1 and group.rank == 0)
    return outcome, heard, told.getvalue().splitlines()


def test_all_ranks_draw_the_same() -> None:
    (first, *others) = run_ranks(draw_five, 3)
    outcome, heard, lines = first
    assert all(other == (outcome, heard, []) for other in others)
    assert (outcome.drawn, outcome.skipped, heard) == ((0, 2, 4), (1,), [0, 2, 4])
    assert outcome.failed == {3: "OSError: [Errno 28] No space left on device: 'x-3.png'"}
    assert lines == [
        "clear-dist: skipped: 1 of 5 pictures, which are there, drawn with the same settings",
        "clear-dist: picture 4 of 5 failed: OSError: [Errno 28] No space left on device: 'x-3.png'",
    ]


def fail_alone(group: Group) -> None:
    def draw(_: int) -> None:
        with alike(group):
            if group.rank == 0:
                raise OSError("no such file")

    with pytest.raises(ItemFailed, match="OSError: no such file"):
        draw_each(1, draw, group=group)


def test_one_alone_ends_with_its_error() -> None:
    run_ranks(fail_alone, 2)
