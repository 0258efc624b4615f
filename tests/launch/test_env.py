from pathlib import Path

import pytest

from clear_dist.launch import env

RANK_1_OF_4 = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


def test_a_process_that_nobody_launched_is_alone() -> None:
    assert env.read({}) == env.Place(rank=0, local_rank=0, world_size=1, local_world_size=1, launcher=None)
    assert not env.launched_by_torchrun({"RANK": "0"})


def test_torchruns_variables() -> None:
    error_file = {"TORCHELASTIC_ERROR_FILE": "/logs/none_x/attempt_0/1/error.json"}
    place = env.read(RANK_1_OF_4 | error_file)
    assert (place.rank, place.world_size, place.local_world_size) == (1, 4, 2)
    assert place.launcher == "torchrun"
    assert place.failures == Path("/logs/none_x/attempt_0")


def test_our_own_variables_are_read_back() -> None:
    place = env.read(env.variables(rank=2, size=3, port=1234, failures=Path("/somewhere"), threads=5))
    assert (place.rank, place.local_rank, place.world_size, place.local_world_size) == (2, 2, 3, 3)
    assert place.launcher == "clear-dist"
    assert place.failures == Path("/somewhere")
    assert (place.threads, place.meeting) == (5, ("127.0.0.1", 1234))
    quiet = env.variables(rank=2, size=3, port=1234, failures=Path("/somewhere"), threads=None)
    assert env.read(quiet).threads is None


@pytest.mark.parametrize(
    "wrong", [{"RANK": "4"}, {"RANK": "one"}, {"WORLD_SIZE": "-1"}, {"LOCAL_RANK": "²"}, {"MASTER_PORT": "x"}]
)
def test_nonsense_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"RANK|WORLD_SIZE|MASTER_PORT"):
        env.read(RANK_1_OF_4 | wrong)
