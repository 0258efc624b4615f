"""FLUX.1-dev's architecture on null GPUs: launches, messages and waits of a steady step, memory beside the plan."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lib.counts import FLUX, middle_part
from benchmarks.lib.planned import planned_bytes
from clear_dist.options import Options
from tests.cuda.full_size import STEPS
from tests.cuda.null_gpu import Machine, NullGpus

WITHIN = 0.03
"""Share of the planned memory."""


@dataclass(frozen=True, kw_only=True)
class Case:
    ranks: int
    side: int
    launches: int
    """The most, as `calls` and `groups`: what they are now."""
    calls: int = 0
    """Calls of NCCL."""
    groups: int = 0
    """NCCL's calls that are issued together count once."""
    tables: int = 0
    """Tables of pointers, which FSDP copies to the GPU, one with each block."""
    in_graph: tuple[int, int, int] = (0, 0, 0)
    """Launches, calls and groups of the graph that is one of the launches, each at most."""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def all_options(self) -> dict[str, Any]:
        return {"window": 16, "attention_backend": "triton", "cuda_graphs": "off"} | self.options

    @property
    def name(self) -> str:
        return " ".join(
            [f"{self.ranks} x {self.side} px", *(f"{name}={value}" for name, value in self.options.items())]
        )


EXACT, STALE = {"text_attention": "exact"}, {"schedule": "stale", "warmup_steps": 1}
GRAPHS = {"cuda_graphs": "auto"}
QUICK = (
    Case(ranks=1, side=1024, launches=597),
    Case(ranks=1, side=1024, launches=8, in_graph=(590, 0, 0), options=GRAPHS),
    Case(ranks=8, side=8192, launches=1067, calls=286, groups=115),
)
SLOW = (
    Case(ranks=1, side=4096, launches=1123),
    Case(ranks=1, side=1024, launches=597, options={"hoist_modulation": True}),
    Case(ranks=1, side=1024, launches=597, options={"compile": True}),
    Case(ranks=1, side=1024, launches=597, options={"window": "full"}),
    Case(ranks=8, side=1024, launches=1016, calls=1426, groups=172),
    Case(ranks=8, side=1024, launches=9, calls=1, groups=1, in_graph=(1008, 1425, 171), options=GRAPHS),
    Case(ranks=8, side=1024, launches=1016, calls=1426, groups=172, options=EXACT),
    Case(ranks=8, side=8192, launches=1067, calls=286, groups=115, options=GRAPHS),
    Case(ranks=8, side=4096, launches=1016, calls=343, groups=172, options=EXACT),
    Case(ranks=8, side=4096, launches=940, calls=286, groups=115, options=EXACT | STALE),
    Case(ranks=8, side=4096, launches=1016, calls=343, groups=172, tables=57, options={"shard_weights": True}),
    Case(ranks=8, side=4096, launches=712, calls=799, groups=58, options={"window": "full"}),
)
CASES = [*QUICK, *(pytest.param(case, marks=pytest.mark.full) for case in SLOW)]
NOT_IN_A_STEP = ("stream_waits", "device_waits", "to_host", "allocations")
"""The host waits for events too, but for those of the step before last."""


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, null_gpus: NullGpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all runs that were selected have written, in files by name and rank."""
    folder = tmp_path_factory.mktemp("full_size")
    items = [item for item in request.session.items if item.module is request.module]
    chosen = [item.callspec.params["case"] for item in items if not item.get_closest_marker("skip")]
    for ranks in {case.ranks for case in chosen}:
        runs = {case.name: (case.side, case.all_options) for case in chosen if case.ranks == ranks}
        ended = null_gpus.run(
            "-m", "tests.cuda.full_size", folder, str(ranks), json.dumps(runs), machine=Machine(gpus=8), folder=folder
        )
        assert ended.status == 0, ended.err
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_step_takes_what_it_took_and_what_was_planned(case: Case, results: Path) -> None:
    found = json.loads((results / f"{case.name}.{case.ranks // 2}").read_text())
    print(found)
    step = found["step"]
    assert found["transport"] == "nccl" and found["retries"] == 0
    assert [name for name in NOT_IN_A_STEP if step[name]] == []
    counted = (step["launches"], step["nccl_calls"], step["nccl_groups"], step["to_device"])
    bounds = (case.launches, case.calls, case.groups, case.tables)
    assert all(number <= bound for number, bound in zip(counted, bounds, strict=True)), (counted, bounds)
    replayed = tuple(step[f"replayed_{name}"] for name in ("launches", "nccl_calls", "nccl_groups"))
    assert all(number <= bound for number, bound in zip(replayed, case.in_graph, strict=True)), (replayed, case)
    assert step["graph_launches"] == any(case.in_graph) and step["products"] + step["replayed_products"] >= 504
    part = middle_part(case.side, case.ranks, case.all_options["window"])
    options = Options(**case.all_options)
    steps = STEPS if options.schedule == "stale" else 1
    planned = planned_bytes(FLUX, part, options, device_type="cuda", steps=steps)
    assert found["allocated"] == pytest.approx(planned, rel=WITHIN)
