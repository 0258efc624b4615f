"""Stream capture on null GPUs: as CUDA has it, a graph counting as the one launch that it is; and generations by it."""

import json
from pathlib import Path

import pytest

from tests.cuda.null_gpu import Machine, NullGpus

ONE_EACH, NONE = [0, 1, 1, 1, 1, 1], [0] * 6
"""Launches of graphs in each step: the first one is as ever."""


def test_graphs_are_launched_as_one_and_captures_fail_as_in_cuda(null_gpus: NullGpus, tmp_path: Path) -> None:
    ended = null_gpus.run("-m", "tests.cuda.capture", machine=Machine(gpus=1), folder=tmp_path)
    assert ended.status == 0, ended.err
    found = json.loads(ended.out)
    print(found)
    twice = {"launches": 2, "graph_launches": 2}
    assert found["eager"] == {"launches": 1}
    assert found["kernels"] == twice | {"replayed_launches": 2 * 3}
    assert found["product"] == twice | {"replayed_products": 2}
    assert found["copy"] == twice | {"replayed_on_device": 2}
    assert found["joined"] == twice | {"replayed_launches": 2 * 2}
    assert "capturing stream has unjoined work" in found["unjoined"]
    assert "operation not permitted when stream is capturing" in found["stream"]
    assert "operation not permitted when stream is capturing" in found["device"]
    assert "event last recorded in a capturing stream" in found["event"]
    assert "dependency created on uncaptured work" in found["outside"]
    assert found["to the host"] and found["pageable"]
    assert found["again"] == twice | {"replayed_launches": 2}


@pytest.mark.parametrize("ranks", [1, 2])
def test_generations_are_replayed_but_for_their_first_forward(ranks: int, null_gpus: NullGpus, tmp_path: Path) -> None:
    ended = null_gpus.run(
        "-m", "tests.cuda.graph_life", tmp_path, str(ranks), machine=Machine(gpus=ranks), folder=tmp_path
    )
    assert ended.status == 0, ended.err
    for rank in range(ranks):
        found = json.loads((tmp_path / f"life.{rank}").read_text())
        print(found)
        assert "operation not permitted when stream is capturing" in found.pop("told")[0]
        assert found == {
            "plain": ONE_EACH,
            "another": ONE_EACH,
            "guided": [1, 2, 2, 2, 2, 2],  # both passes by one graph
            "larger": ONE_EACH,
            "two": ONE_EACH,
            "few steps": [0, 0, 0],
            "kept": 0,  # bytes, once a generation is over
            "reads": NONE,  # a capture that failed, in a layer that reads from the GPU
            "again": ONE_EACH,
            "undone": NONE,
            "controlled": [0, 2, 2, 2, 2, 2],  # the ControlNet's and the transformer's
        }
