"""SD3.5's architectures on null GPUs: launches and messages of a steady step with guidance, memory beside the plan."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lib.planned import engine
from clear_dist.families.cards import CARDS
from clear_dist.options import Options
from clear_dist.plan.questions import Module, StepQuestion, WeightsQuestion
from tests.cuda.null_gpu import Machine, NullGpus
from tests.cuda.sd3 import TEXT_TOKENS
from tests.cuda.test_full_size import NOT_IN_A_STEP, WITHIN

OPTIONS: dict[str, Any] = {
    "window": 16,
    "attention_backend": "triton",
    "cuda_graphs": "off",
    "text_attention": "exact",
    "text_tokens": "replicated",
}
RANKS, SIDE = 2, 2048
LAUNCHES = {"sd3.5-large": 871, "sd3.5-medium": 654}
"""At most: what they are now."""
MESSAGES = {"sd3.5-large": 38, "sd3.5-medium": 24 + 13}
"""Layers, each with halos; those of the image alone reduce no text."""


@pytest.fixture(scope="module")
def results(null_gpus: NullGpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd3")
    runs = {model: (model, SIDE, OPTIONS) for model in MESSAGES}
    ended = null_gpus.run(
        "-m", "tests.cuda.sd3", folder, str(RANKS), json.dumps(runs), machine=Machine(gpus=8), folder=folder
    )
    assert ended.status == 0, ended.err
    return folder


def planned_bytes(model: str, rank: int) -> int:
    _, known = CARDS.on_hub(model) or pytest.fail(model)
    about = {
        "module": Module(kind="diffusers.SD3Transformer2DModel", config=known.configs["transformer"]),
        "dtype": "bfloat16",
        "device": "cuda",
        "ranks": RANKS,
        "options": Options(**OPTIONS).settled(16),
    }
    step = StepQuestion(
        transport="nccl", height=SIDE // 16, width=SIDE // 16, rank=rank, images=2, text_tokens=TEXT_TOKENS,
        passes=1, steps=1, down_factor=1, has_lora=False, **about,
    )  # fmt: skip
    return engine().ask(WeightsQuestion(**about)).held + sum(engine().ask(step).peak.values())


@pytest.mark.parametrize("model", MESSAGES)
def test_a_step_waits_for_nothing_and_takes_what_was_planned(model: str, results: Path) -> None:
    for rank in range(RANKS):
        found = json.loads((results / f"{model}.{rank}").read_text())
        print(found)
        step = found["step"]
        assert found["transport"] == "nccl" and found["retries"] == 0
        assert [name for name in NOT_IN_A_STEP if step[name]] == []
        layers = MESSAGES[model]
        assert step["launches"] <= LAUNCHES[model]
        alone = layers - 24 if model == "sd3.5-medium" else 0
        # Halos of every layer, the exact reduction's two where the text is seen, the join.
        assert step["nccl_groups"] == layers + 2 * (layers - alone) + 1
        assert found["allocated"] == pytest.approx(planned_bytes(model, rank), rel=WITHIN)
