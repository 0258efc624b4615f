"""FLUX.1-dev's architecture on null GPUs: launches, messages and waits of a steady step, memory beside the plan."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lib.counts import FLUX, middle_part
from benchmarks.lib.steps import config_of
from clear_dist.options import Options
from clear_dist.plan.engine import Engine
from clear_dist.plan.questions import Module, StepQuestion, WeightsQuestion
from tests.cuda.full_size import STEPS
from tests.cuda.null_gpu import Machine, NullGpus

WITHIN = 0.03
"""Of the planned memory."""


@dataclass(frozen=True, kw_only=True)
class Case:
    ranks: int
    side: int
    launches: int
    """At most, as `calls` and `groups`: what they are now."""
    calls: int = 0
    """Of NCCL."""
    groups: int = 0
    """NCCL's calls that are issued together count once."""
    tables: int = 0
    """Of pointers, which FSDP copies to the GPU, one with each block."""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def all_options(self) -> dict[str, Any]:
        return {"window": 16, "attention_backend": "triton"} | self.options

    @property
    def name(self) -> str:
        return " ".join(
            [f"{self.ranks} x {self.side} px", *(f"{name}={value}" for name, value in self.options.items())]
        )


EXACT, STALE = {"text_attention": "exact"}, {"schedule": "stale", "warmup_steps": 1}
QUICK = (
    Case(ranks=1, side=1024, launches=2756),
    Case(ranks=8, side=8192, launches=8742, calls=286, groups=115),
)
SLOW = (
    Case(ranks=1, side=4096, launches=9520),
    Case(ranks=1, side=1024, launches=2756, options={"hoist_modulation": True}),
    Case(ranks=1, side=1024, launches=1084, options={"compile": True}),
    Case(ranks=1, side=1024, launches=2699, options={"window": "full"}),
    Case(ranks=8, side=1024, launches=5322, calls=1426, groups=172),
    Case(ranks=8, side=1024, launches=6234, calls=1426, groups=172, options=EXACT),
    Case(ranks=8, side=4096, launches=6576, calls=343, groups=172, options=EXACT),
    Case(ranks=8, side=4096, launches=6804, calls=286, groups=115, options=EXACT | STALE),
    Case(ranks=8, side=4096, launches=5949, calls=343, groups=172, tables=57, options={"shard_weights": True}),
    Case(ranks=8, side=4096, launches=3099, calls=799, groups=58, options={"window": "full"}),
)
CASES = [*QUICK, *(pytest.param(case, marks=pytest.mark.full) for case in SLOW)]
NOT_IN_A_STEP = ("stream_waits", "device_waits", "to_host", "allocations")
"""The host waits for events too, but for those of the step before last."""


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine()


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
def test_a_step_takes_what_it_took_and_what_was_planned(case: Case, engine: Engine, results: Path) -> None:
    found = json.loads((results / f"{case.name}.{case.ranks // 2}").read_text())
    print(found)
    step = found["step"]
    assert found["transport"] == "nccl" and found["retries"] == 0
    assert [name for name in NOT_IN_A_STEP if step[name]] == []
    counted = (step["launches"], step["nccl_calls"], step["nccl_groups"], step["to_device"])
    bounds = (case.launches, case.calls, case.groups, case.tables)
    assert all(number <= bound for number, bound in zip(counted, bounds, strict=True)), (counted, bounds)
    assert found["allocated"] == pytest.approx(planned_bytes(case, engine), rel=WITHIN)


def planned_bytes(case: Case, engine: Engine) -> int:
    window = case.all_options["window"]
    part = middle_part(case.side, case.ranks, window)
    settled = Options(**case.all_options).settled(window)
    about = {
        "module": Module(kind="diffusers.FluxTransformer2DModel", config=config_of(FLUX)),
        "dtype": "bfloat16",
        "device": "cuda",
        "ranks": case.ranks,
        "options": settled,
    }
    step = StepQuestion(
        transport="nccl", height=part.grid[0], width=part.grid[1], rank=part.rank, images=1, text_tokens=512, passes=1,
        steps=STEPS if settled.schedule == "stale" else 1, down_factor=1, has_lora=False, **about,
    )  # fmt: skip
    return engine.ask(WeightsQuestion(**about)).held + sum(engine.ask(step).peak.values())
