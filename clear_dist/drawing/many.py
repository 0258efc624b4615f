"""A list drawn with one load, alike on all ranks: what is there is skipped, what fails is told, the others go on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from clear_dist.comm.group import Group
from clear_dist.launch.ends import Failure, describe, say
from clear_dist.options import Refusal


class ItemFailed(Failure):
    """What is wrong with one item's files, raised on all ranks alike."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a list, by indices; equal on all ranks."""

    drawn: tuple[int, ...]
    skipped: tuple[int, ...]
    failed: Mapping[int, str]
    """Why, by index."""


@contextmanager
def alike(group: Group) -> Iterator[None]:
    """Work with files on rank 0 that no other rank waits for: its OSError or Refusal is an ItemFailed on all ranks."""
    error: OSError | Refusal | None = None
    try:
        yield
    except (OSError, Refusal) as caught:
        if group.rank != 0:
            raise
        error = caught
    why = group.broadcast_object(
        None if error is None else str(error) if isinstance(error, Refusal) else describe(error)
    )
    if why is not None:
        raise ItemFailed(why) from error


def draw_each(
    count: int,
    draw: Callable[[int], None],
    *,
    group: Group,
    mine: Sequence[int] | None = None,
    is_there: Callable[[int], bool] | None = None,
    keep_going: bool = True,
    kind: str = "picture",
) -> Outcome:
    """Call `draw` for each index of a list on all ranks; where it raises ItemFailed, the next one's turn has come.

    Args:
        mine: indices of this group's items, where other groups draw others; None: all.
        is_there: whether an item is finished, as rank 0 finds; None: all are drawn.
        keep_going: whether the others are drawn where one fails.
        kind: of an item, for the lines that tell of them.

    Raises ItemFailed if there is one item only, or none is to follow it, and on all ranks whatever else `draw` raises.
    """
    indices = range(count) if mine is None else mine
    found = [] if is_there is None or group.rank != 0 else [index for index in indices if is_there(index)]
    skipped: list[int] = [] if is_there is None else group.broadcast_object(found)
    if skipped and group.rank == 0:
        say(f"skipped: {len(skipped)} of {count} {kind}s, which are there, drawn with the same settings")
    drawn, failed = [], {}
    for index in indices:
        if index in skipped:
            continue
        try:
            draw(index)
            drawn.append(index)
        except ItemFailed as error:
            if count == 1 or not keep_going:
                raise
            failed[index] = str(error)
            if group.rank == 0:
                say(f"{kind} {index + 1} of {count} failed: {error}")
    return Outcome(drawn=tuple(drawn), skipped=tuple(skipped), failed=failed)
