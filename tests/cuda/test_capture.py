"""Stream capture on null GPUs: as CUDA has it, and a graph counts as the one launch that it is."""

import json
from pathlib import Path

from tests.cuda.null_gpu import Machine, NullGpus


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
