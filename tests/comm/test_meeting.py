"""Ranks that meet as a launcher's: late, again and again, not at all; and one alone, without a network."""

import os
import random
import re
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from clear_dist.comm import meeting
from clear_dist.comm.group import Group
from clear_dist.options import Refusal
from tests.forked import Forked, forked

ROOT = Path(__file__).parents[2]


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(function: object, rank: int, size: int, port: int, **variables: str) -> Forked:
    return forked(partial(be_rank, function, place(rank, size, port) | variables))


def place(rank: int, size: int, port: int) -> dict[str, str]:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    return {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}


def be_rank(function: partial[None], variables: dict[str, str]) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    function()


def meet_again_and_again(rounds: int, latest: float) -> None:
    """Groups come and go as with `parallelize` and `undo`, sometimes two at once."""
    late = random.Random(os.environ["RANK"])
    for number in range(rounds):
        time.sleep(late.random() * latest)
        groups = [Group.create("cpu") for _ in range(1 + number % 2)]
        for group in groups:
            everyone = [str(rank) for rank in range(group.size)]
            assert group.gather_objects(os.environ["RANK"]) == everyone
        for group in groups:
            group.close()
    print("done", rounds)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("agent", [False, True])
def test_ranks_meet_again_and_again(size: int, agent: bool, port: int) -> None:
    """Also over the store of torchrun's agent, which outlasts each meeting."""
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False) if agent else None
    work = partial(meet_again_and_again, 10, 0.1)
    ranks = [start(work, rank, size, port, TORCHELASTIC_USE_AGENT_STORE=str(agent)) for rank in range(size)]
    for rank in ranks:
        assert rank.communicate() == ("done 10\n", "")
        assert rank.returncode == 0
    del store


def destroy_and_meet_again(again: int) -> None:
    for _ in range(again):
        meet_again_and_again(2, 0.1)
        dist.destroy_process_group()


def test_ranks_meet_after_a_script_has_shut_torch_down(port: int) -> None:
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    work = partial(destroy_and_meet_again, 4)
    ranks = [start(work, rank, 2, port, TORCHELASTIC_USE_AGENT_STORE="True") for rank in range(2)]
    assert [rank.communicate() for rank in ranks] == [("done 2\n" * 4, "")] * 2
    del store


def wait_in_vain(seconds: float) -> None:
    meeting.FIRST_WORD_SECONDS, meeting.SECONDS_BETWEEN_WORDS = 0.2, 0.3  # this process is the rank's own
    try:
        Group.create("cpu", join_seconds=seconds)
    except ConnectionError as error:
        print(error)


@pytest.mark.parametrize(("rank", "other", "speaks"), [(0, 2, True), (2, 0, False)])
def test_missing_ranks_are_named_by_one_that_is_there(rank: int, other: int, speaks: bool, port: int) -> None:
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    dist.PrefixStore("clear-dist/meeting 1", store).set(str(other), "")  # has come
    waiting = start(partial(wait_in_vain, 1.0), rank, 4, port, TORCHELASTIC_USE_AGENT_STORE="True")
    told, errors = waiting.communicate()
    assert told == (
        f"cannot meet the other ranks at 127.0.0.1:{port}: ranks 1, 3 of 4 did not come within 1 s; "
        "to wait longer: --join-timeout (Python: join_seconds)\n"
    )
    assert bool(errors) == speaks
    assert all(line.startswith("clear-dist: waiting for ranks 1, 3 of 4 since ") for line in errors.splitlines())


def test_rank_0_is_missed_by_the_first_of_its_machine(port: int) -> None:
    ranks = [start(partial(wait_in_vain, 1.0), rank, 3, port, TORCH_CPP_LOG_LEVEL="FATAL") for rank in (1, 2)]
    (told, errors), (told_too, nothing) = [rank.communicate() for rank in ranks]
    assert "rank 0 of 3 did not come within 1 s" in told and told == told_too
    assert "waiting for rank 0 of 3 since " in errors and nothing == ""


@pytest.mark.parametrize(("host", "why"), [("127.0.0.1", "in use"), ("nowhere.invalid", "not known")])
def test_ranks_that_cannot_meet_say_where(host: str, why: str, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        for name, value in (place(0, 2, port) | {"MASTER_ADDR": host}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConnectionError, match=f"cannot meet the other ranks at {host}:{port}: .*{why}"):
            Group.create("cpu", join_seconds=5)


def test_an_interface_that_is_not_here_is_refused(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (place(1, 2, port) | {"GLOO_SOCKET_IFNAME": "lo,ol"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        Refusal, match="GLOO_SOCKET_IFNAME must name network interfaces of this machine, got 'ol'; nearest: lo"
    ):
        Group.create("cpu", join_seconds=5)


ALONE = "group = Group.create('cpu'); print(group.gather_objects(group.size)); group.close()"
TWO = "Group.create('cpu', join_seconds=60)"


@pytest.mark.parametrize(
    ("size", "code", "told"),
    [(1, ALONE, r"\[1\]"), (2, TWO, "ConnectionError: cannot meet .*: no network interface that is up leads there")],
)
def test_without_any_network(size: int, code: str, told: str, port: int) -> None:
    """A network of its own, whose `lo` is down, is what a new namespace has."""
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        pytest.skip("namespaces are not allowed here")
    command = ["unshare", "-rn", sys.executable, "-c", f"from clear_dist.comm.group import Group; {code}"]
    environment = os.environ | place(size - 1, size, port) | {"GLOO_SOCKET_IFNAME": "" if size > 1 else "nope"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert re.match(told, (ended.stdout or ended.stderr).splitlines()[-1])
