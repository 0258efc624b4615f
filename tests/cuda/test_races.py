"""Every read and write of every operation and message of three ranks is ordered, in each mode; faults are found."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cuda.null_gpu import Machine, NullGpus
from tests.cuda.races import check

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
        assert checker.operations.total() > 1000 and len(checker.operations) > 1
        assert checker.races == {}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_was_put_in_is_found(fault: str, logs: Path) -> None:
    assert any(check((logs / f"{fault}.{rank}").open()).races for rank in RANKS_LOOKED_AT)
