"""What ranks do while one of them fetches: they wait, fail together, and compare what they hold."""

import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from clear_dist import hub
from clear_dist.comm import in_touch
from clear_dist.comm.group import Group
from clear_dist.families.cards import CARDS
from clear_dist.options import Refusal
from tests.patience import PATIENCE
from tests.ranks import RanksFailedError, run_ranks


@dataclass(frozen=True)
class FromTheHub:
    """What `locate` reads of a request."""

    model: str = "folder"
    clear_weights: str = "owner/name:file"
    from_folder: bool = True
    loras: tuple[()] = ()
    control: None = None
    quiet: bool = True


def unchecked(request: FromTheHub, folder: Path, file: str, *_: object) -> str:
    """Stands in for the checks of what was fetched."""
    return file


def fetch_for_longer_than_the_timeout(group: Group, fails: bool) -> str:
    in_touch.SECONDS_BETWEEN_WORDS = 0.2  # this process is the rank's own
    impatient = Group.create("cpu", timeout_seconds=2 * PATIENCE)

    def fetch(_: object, *, quiet: bool) -> None:
        time.sleep(3 * PATIENCE)
        if fails:
            raise ZeroDivisionError("the cause")

    hub.fetch, hub.cached, hub.located = fetch, lambda want: Path("here"), unchecked
    return hub.locate(FromTheHub(), impatient, CARDS, local_rank=group.rank)  # type: ignore


def test_a_slow_download_does_not_lose_the_ranks_that_wait_for_it() -> None:
    assert run_ranks(fetch_for_longer_than_the_timeout, 2, False) == ["here/file", "here/file"]


def test_a_failed_download_is_told_by_all_ranks() -> None:
    with pytest.raises(RanksFailedError) as failed:
        run_ranks(fetch_for_longer_than_the_timeout, 2, True)
    assert [failed.value.failures[rank].splitlines()[-1] for rank in (0, 1)] == [
        "ZeroDivisionError: the cause",
        "RuntimeError: ZeroDivisionError: the cause",
    ]


def hold(group: Group, commits: list[str]) -> str:
    try:
        hub.require_same_commit(group, "someone/tiny", commits[group.rank])
    except Refusal as error:
        return str(error)
    return ""


def test_machines_that_hold_different_commits_are_refused() -> None:
    assert run_ranks(hold, 2, ["a", "a"]) == ["", ""]
    line = "all machines must hold the same commit of someone/tiny, got a, b; nearest: --revision a"
    assert run_ranks(hold, 3, ["a", "b", "a"]) == [line] * 3
