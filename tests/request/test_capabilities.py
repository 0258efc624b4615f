"""What GPUs can multiply decides the dtype, and what is refused."""

from dataclasses import replace

import pytest

from clear_dist.families.cards import CARDS
from clear_dist.launch.env import Place
from clear_dist.options import Refusal
from clear_dist.request import devices
from clear_dist.request.flags import GenerateFlags
from clear_dist.request.settle import settle

ALONE, DEMO = Place(), GenerateFlags(model="demo")


@pytest.fixture(params=[(8.0, 7.5)], ids=str)
def gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs of these compute capabilities."""
    found = tuple(
        devices.FoundGpu(name=f"NVIDIA {each}", capability=each, total=85 * 10**9, free=84 * 10**9)
        for each in request.param
    )
    monkeypatch.setattr(devices, "find_gpus", lambda: found)
    monkeypatch.setattr(devices, "why_torch_sees_none", lambda: None)


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("gpus", "dtype"),
    [((7.5,), "float16"), ((8.0, 7.5), "float16"), ((8.0,), "bfloat16"), ((12.0, 8.6), "bfloat16"), ((), "float32")],
    ids=str,
    indirect=["gpus"],
)
def test_auto_is_what_all_gpus_multiply(dtype: str) -> None:
    request, _, lines = settle(DEMO, ALONE, CARDS)
    assert request.dtype == dtype
    assert ("dtype: float16 (GPUs of compute capability below 8.0 lack bfloat16)" in lines) == (dtype == "float16")


@pytest.mark.usefixtures("gpus")
def test_a_dtype_that_a_gpu_lacks_is_refused() -> None:
    assert settle(replace(DEMO, dtype="float32"), ALONE, CARDS)[0].dtype == "float32"
    message = r"--dtype bfloat16 needs .* 8\.0 or higher, got 7\.5 \(NVIDIA 7\.5\); nearest: float16"
    with pytest.raises(Refusal, match=message):
        settle(replace(DEMO, dtype="bfloat16"), ALONE, CARDS)
    with pytest.raises(Refusal, match=r"--float8 needs .* 8\.9 or higher, got 8\.0 .*; nearest: without --float8"):
        settle(replace(DEMO, float8=True), ALONE, CARDS)


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("gpus", [(9.0, 7.5)], ids=str, indirect=True)
def test_gpus_without_a_rank_do_not_matter() -> None:
    for place, nproc in ((ALONE, 1), (Place(launcher="torchrun", world_size=2, local_world_size=1), None)):
        for asked in ({}, {"dtype": "bfloat16"}, {"float8": True}):
            assert settle(replace(DEMO, nproc=nproc, **asked), place, CARDS)[0].dtype == "bfloat16"
