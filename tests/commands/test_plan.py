"""`clear-dist plan` as a user meets it."""

import json
from pathlib import Path

import pytest

from clear_dist.commands.plan import planned_for
from clear_dist.families.flux.card import FLUX_SCHNELL
from clear_dist.request.flags import PlanFlags
from tests.commands.test_app import run

NONE_HERE = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


def planned(tmp_path: Path, *arguments: str) -> tuple[int, list[str], list[str]]:
    return run("plan", *arguments, cwd=tmp_path, **NONE_HERE)


def test_what_fits(tmp_path: Path) -> None:
    status, lines, errors = planned(tmp_path, "--res", "8192", "--nproc", "8", "--gpu", "h100")
    assert (status, errors) == (0, [])
    assert lines[0].startswith("black-forest-labs/FLUX.1-dev, 8192x8192 px, radius 16, bfloat16 on H100")
    assert lines[-1].startswith("fits: it needs ")
    text = "\n".join(lines)
    for part in ("transformer", "VAE", "text encoders", "halos", "decode", "stripes: 8 of 64", "assumed: ", "waiting"):
        assert part in text
    for whole in ("8192x8192 ", "all, about "):
        assert any(line.lstrip().startswith(whole) for line in lines), "80 columns are enough for a row of times"


def test_any_gpu_is_known_by_its_memory(tmp_path: Path) -> None:
    status, lines, errors = planned(tmp_path, "--model", "demo", "--gpu-memory", "16")
    assert (status, errors) == (0, [])
    assert lines[-1].endswith("of the 16.0 GB of a GPU of 16 GB")
    assert "assumed: no time is estimated for a GPU of 16 GB" in lines
    other = planned_for(PlanFlags(gpu="RTX4090", gpu_memory=48))
    other.engine.stop()
    assert (other.room.bytes, other.room.where) == (48 * 10**9, "RTX4090")


def test_what_does_not_fit(tmp_path: Path) -> None:
    status, lines, errors = planned(tmp_path, "--res", "8192", "--model", FLUX_SCHNELL, "--gpu", "RTX4090")
    assert (status, errors) == (2, [])
    assert lines[-1].startswith("does not fit: it needs ") and "; nearest: --" in lines[-1]
    flags = lines[-1].split("nearest: ")[1].split()
    status, lines, errors = planned(tmp_path, "--res", "8192", "--model", FLUX_SCHNELL, "--gpu", "rtx4090", *flags)
    assert (status, errors) == (0, []), lines[-1]


def test_flags_for_smaller_gpus(tmp_path: Path) -> None:
    flags = ("--shard-weights", "--int8", "--offload", "--keep-text-encoder", "--text-tokens", "replicated")
    weights = ("--clear-weights", "Huage001/CLEAR:clear_local_8_down_4.safetensors")
    status, lines, _ = planned(
        tmp_path, "--res", "8192", "--nproc", "8", "--gpu", "rtx3090", "--json", *flags, *weights
    )
    found = json.loads("\n".join(lines))
    asked = {"shard_weights": True, "int8": True, "offload": True, "keep_text_encoder": True}
    assert status == 0 and found["request"] | asked == found["request"]
    assert (found["request"]["down_factor"], found["request"]["window"]) == (4, 8)
    assert found["request"]["text_sharding"] == "replicated"
    assert all(found["bytes_per_step"][name] > 0 for name in ("pooled_sent", "weights_sent", "halos_sent"))
    first = {phase["name"]: phase["items"] for phase in found["memory"][0]["phases"]}
    assert {"blocks gathered", "pooled keys"} <= first["denoise"].keys() and "VAE" not in first["denoise"]


def test_a_sweep_of_weights_in_shards_ends_where_a_stage_has_no_more_rows(tmp_path: Path) -> None:
    """The first one has 64 rows of tokens, 16 units of down-sampled ones."""
    weights = ("--clear-weights", "Huage001/CLEAR:clear_local_8_down_4.safetensors")
    _, lines, _ = planned(tmp_path, "--res", "2048", "--sweep", "--json", "--shard-weights", *weights)
    assert [row["ranks"] for row in json.loads("\n".join(lines))["sweep"]][-1] == 16


def test_for_programs(tmp_path: Path) -> None:
    status, lines, _ = planned(tmp_path, "--res", "1024", "--nproc", "3", "--json", "--schedule", "stale")
    found = json.loads("\n".join(lines))
    assert status == 0 and found["fits"] is True and len(found["memory"]) == 3
    assert found["request"]["schedule"] == "stale"
    _, lines, _ = planned(tmp_path, "--res", "1024", "--sweep", "--json", "--schedule", "stale")
    swept = {row["ranks"]: row for row in json.loads("\n".join(lines))["sweep"]}
    assert max(swept) == 64
    assert swept[3]["needed"] == found["needed"] and swept[3]["seconds"] == found["seconds"]["all"]


def test_a_sweep_goes_as_far_as_there_are_rows(tmp_path: Path) -> None:
    status, lines, errors = planned(tmp_path, "--res", "512", "--sweep", "--window", "8")
    assert (status, errors) == (0, [])
    first = [line.split()[0] for line in lines if line[:3].strip().isdigit()]
    assert first[0] == "1" and first[-1] == "32"


def test_the_demo_is_planned_for_this_cpu(tmp_path: Path) -> None:
    status, lines, errors = planned(tmp_path, "--model", "demo", "--nproc", "2", "--gpu", "CPU")
    assert (status, errors) == (0, [])
    assert "on CPU" in lines[0] and "this machine for 2 ranks" in lines[-1]
    assert "assumed: no time is estimated for CPUs" in lines


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "h1000"], "--gpu must be one of auto, cpu, h100"),
        (["--gpu", "rtx4080"], "got 'rtx4080'; nearest: rtx4090, or --gpu-memory GB"),
        (["--gpu", "16GB"], "got '16gb'; nearest: --gpu-memory 16"),
        (["--gpu", "cpu", "--gpu-memory", "16"], "--gpu-memory is for GPUs, got --gpu cpu too"),
        (["--link", "string"], "--link must be one of auto, nvlink"),
        (["--nproc", "65", "--res", "1024"], "64 rows of tokens can be cut for 1 to 64 ranks, got 65; nearest: 64"),
        (
            ["--model", "someone/flux-like"],
            "whose configuration is known, got someone/flux-like; nearest: black-forest",
        ),
        (["--res", "1000"], "--res must be a multiple of 16"),
        (["--text-attention", "average", "--window", "full"], "must be exact where the window is full"),
    ],
)
def test_wrong_requests(arguments: list[str], words: str, tmp_path: Path) -> None:
    status, lines, errors = planned(tmp_path, *arguments)
    assert (status, lines, len(errors)) == (2, [], 1)
    assert words in errors[0]
