"""Every read and write of every operation and message of three ranks is ordered, in each mode; faults are found."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.cuda.null_gpu import Machine, NullGpus
from tests.cuda.races import Checker, check

EXACT: dict[str, Any] = {"text_attention": "exact"}
STALE: dict[str, Any] = {"schedule": "stale", "warmup_steps": 1}
MODES = {
    "exact": EXACT,
    "average": {"text_attention": "average"},
    "exact, text replicated": EXACT | {"text_tokens": "replicated"},
    "average, text replicated": {"text_attention": "average", "text_tokens": "replicated"},
    "full": {"window": "full", "text_tokens": "sharded"},
    "stale": EXACT | STALE,
    "stale, average": {"text_attention": "average"} | STALE,
    "stale, full": {"window": "full"} | STALE,
    "shards": EXACT | {"shard_weights": True},
    "hoisted": {"text_attention": "average", "hoist_modulation": True},
}


FAULTS = {"fault aside": EXACT | STALE | {"fault": "aside"}, "fault halos": EXACT | {"fault": "halos"}}
RANKS_LOOKED_AT = (0, 1)
"""The outer and the middle one of three."""


@pytest.fixture(scope="module")
def logs(null_gpus: NullGpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all runs have logged, in files by name and rank."""
    folder = tmp_path_factory.mktemp("logs")
    runs = {name: {"window": 4, "attention_backend": "tiled"} | run for name, run in (MODES | FAULTS).items()}
    ended = null_gpus.run(
        "-m", "tests.cuda.race_log", folder, "3", json.dumps(runs), machine=Machine(gpus=3), folder=folder
    )
    assert ended.status == 0, ended.err
    return folder


@pytest.mark.parametrize("mode", MODES)
def test_nothing_races(mode: str, logs: Path) -> None:
    for rank in RANKS_LOOKED_AT:
        checker = check((logs / f"{mode}.{rank}").open())
        assert checker.operations.total() > 500 and len(checker.operations) > 1
        assert checker.races == {}


def knew_of_all_halos(log: Path) -> list[bool]:
    """After each join, which is the only all-gather: whether the default stream has waited for all halos so far."""
    checker, halos, is_joining, known = Checker(), 0, False, []
    for line in log.open():
        if is_joining and line.startswith("# op"):
            known.append(checker.has_waited(0, halos))
            is_joining = False
        checker.read(line)
        is_joining = is_joining or line.startswith("nccl allgather")
        if sent := re.match(r"nccl send comm \S+ stream (\S+)", line):
            halos = int(sent[1], 16)
    return known


def messages(log: Path) -> dict[str, tuple[str, str]]:
    """Communicator and stream of each kind of message."""
    found = re.findall(r"^nccl (\w+) comm (\S+) stream (\S+)", log.read_text(), re.MULTILINE)
    return {call: (communicator, stream) for call, communicator, stream in found}


@pytest.mark.parametrize("text_attention", ["exact", "average"])
def test_a_stale_step_ends_while_halos_are_in_flight(text_attention: str, logs: Path) -> None:
    stale = {"exact": "stale", "average": "stale, average"}[text_attention]
    for rank in RANKS_LOOKED_AT:
        assert all(knew_of_all_halos(logs / f"{text_attention}, text replicated.{rank}"))
        assert not knew_of_all_halos(logs / f"{stale}.{rank}")[-1]
        sent = messages(logs / f"{stale}.{rank}")
        # NCCL itself has messages of one communicator wait for each other.
        assert sent["send"][0] != sent["allgather"][0] == sent["allreduce"][0]


def test_text_has_a_stream_of_high_priority(logs: Path) -> None:
    for rank in RANKS_LOOKED_AT:
        made = (logs / f"connecting.{rank}").read_text()
        priorities = dict(re.findall(r"newstream (\S+) priority (-?\d+)", made))
        sent = messages(logs / f"exact, text replicated.{rank}")
        halos, text = (int(priorities[sent[call][1]]) for call in ("send", "allreduce"))
        assert text < halos == 0  # the lower, the sooner


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_was_put_in_is_found(fault: str, logs: Path) -> None:
    assert any(check((logs / f"{fault}.{rank}").open()).races for rank in RANKS_LOOKED_AT)
