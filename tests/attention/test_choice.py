"""Which backend is chosen, and what is said about the others."""

import logging
from types import SimpleNamespace

import pytest
import torch

from clear_dist.attention import BACKENDS, choose_backend, flex, triton_window, window_attention
from clear_dist.attention.backend import CallShape
from tests.attention.calls import Case

LARGE = {"heads": 24, "rows": 256, "key_rows": 256, "columns": 256}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_on_cpu_is_tiled_and_says_why_not_flex(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="clear_dist.attention"):
        assert choose_backend("auto", device="cpu", dtype=dtype, **LARGE).name == "tiled"
        assert choose_backend("auto", device=torch.device("cpu"), dtype=dtype).name == "tiled"
    assert "flex skipped: it holds all scores at once" in caplog.text
    assert "flex skipped: on cpu it is used only when asked for by name" in caplog.text


def test_auto_on_cuda_is_flex_if_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clear_dist.attention.flex.find_spec", lambda _: object())
    assert choose_backend("auto", device="cuda", dtype=torch.bfloat16, head_dim=128, **LARGE).name == "flex"
    assert choose_backend("auto", device="cuda", dtype=torch.bfloat16, head_dim=8, **LARGE).name == "tiled"
    assert choose_backend("auto", device="cuda", dtype=torch.float64).name == "tiled"
    monkeypatch.setattr("clear_dist.attention.flex.find_spec", lambda _: None)
    assert choose_backend("auto", device="cuda", dtype=torch.bfloat16, head_dim=128, **LARGE).name == "tiled"
    with pytest.raises(ValueError, match=r"flex cannot run: its compiler, the package triton.*nearest: tiled"):
        choose_backend("flex", device="cuda", dtype=torch.bfloat16)


def test_triton_is_used_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clear_dist.attention.triton_window.find_spec", lambda _: object())
    asked = {"device": "cuda", "dtype": torch.bfloat16}
    assert choose_backend("triton", **asked, head_dim=128).name == "triton"
    with pytest.raises(ValueError, match="triton cannot run: it takes heads of 16, 32, 64, 128, 256, got 80"):
        choose_backend("triton", **asked, head_dim=80)
    with pytest.raises(ValueError, match=r"it takes float32, bfloat16 and float16, got torch\.float64"):
        choose_backend("triton", device="cuda", dtype=torch.float64)
    monkeypatch.setattr("clear_dist.attention.triton_window.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="triton cannot run: its compiler, the package triton, is not installed"):
        choose_backend("triton", **asked)
    with pytest.raises(ValueError, match="triton cannot run: it runs on cuda, and for tests on cpu, got mps"):
        choose_backend("triton", device="mps", dtype=torch.float32)


@pytest.fixture
def turing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of compute capability 7.5, with its 64 KiB of shared memory, and Triton."""
    properties = SimpleNamespace(shared_memory_per_block_optin=65_536, shared_memory_per_block=49_152)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    for module in (flex, triton_window):
        monkeypatch.setattr(module, "find_spec", lambda _: object())


@pytest.mark.usefixtures("turing")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_before_ampere_it_is_tiled(dtype: torch.dtype) -> None:
    asked = {"device": "cuda", "dtype": dtype, "head_dim": 128}
    assert choose_backend("auto", **asked, **LARGE).name == "tiled"
    assert choose_backend("masked", **asked).name == "masked"
    with pytest.raises(
        ValueError, match=r"triton cannot run: .* 99 KiB .* capability 8 .*, got 64 KiB; nearest: tiled"
    ):
        choose_backend("triton", **asked)
    with pytest.raises(ValueError, match=r"flex cannot run: .* capability 8 or higher, got 7; nearest: tiled"):
        choose_backend("flex", **asked)


@pytest.mark.usefixtures("turing")
@pytest.mark.parametrize("name", ["auto", "tiled", "reference"])
def test_before_ampere_there_is_no_bfloat16(name: str) -> None:
    asked = {"device": "cuda", "dtype": torch.bfloat16}
    with pytest.raises(ValueError, match=r"bfloat16 needs a GPU of compute capability 8 .*, got 7; nearest: float16"):
        choose_backend(name, **asked)
    assert choose_backend(name, **asked, anywhere=True)


def test_auto_on_another_device_is_tiled() -> None:
    assert choose_backend("auto", device="mps", dtype=torch.float32).name == "tiled"


@pytest.mark.parametrize("name", ["reference", "flex"])
def test_what_holds_all_scores_is_refused_for_large_images(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} cannot run: .* 384.0 GiB, at most 1; nearest: tiled"):
        choose_backend(name, device="cpu", dtype=torch.float32, **LARGE)


def test_a_run_is_checked_again_now_that_sizes_are_known() -> None:
    case = Case(rows=256, key_rows=256, columns=256, text=0, radius=2, heads=1, head_dim=1)
    backend = choose_backend("reference", device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match="reference cannot run: it holds all scores"):
        window_attention(*case.tensors(), radius=2, row_offset=0, backend=backend)


@pytest.mark.parametrize(("name", "nearest"), [("flexx", "flex"), ("tilde", "tiled"), ("Auto", "auto")])
def test_an_unknown_name_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(
        ValueError,
        match=f"one of auto, flex, flash, triton, tiled, masked, reference; got '{name}'; nearest: {nearest}",
    ):
        choose_backend(name, device="cpu", dtype=torch.float32)


def test_integers_cannot_be_attended_to() -> None:
    assert BACKENDS["tiled"].why_not(CallShape("cpu", torch.int32))
    with pytest.raises(ValueError, match="no attention backend can run"):
        choose_backend("auto", device="cpu", dtype=torch.int32)
