"""LoRA for some stages before anything is loaded: what may be asked, short names, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from clear_dist.families.cards import CARDS
from clear_dist.families.flux.card import FLUX_DEV, FLUX_SCHNELL
from clear_dist.launch.env import Place
from clear_dist.options import Refusal
from clear_dist.request.flags import GenerateFlags
from clear_dist.request.request import Lora
from clear_dist.request.settle import settle
from tests.request.test_lora import CLIP, Tensors, loras_of, model, only, tensors
from tests.tiny_lora import save_lora

__all__ = ["model", "tensors"]


def test_words_that_name_stages(model: Path, tensors: Tensors, tmp_path: Path) -> None:
    """After the last @, where it is no revision's."""
    file = save_lora(tensors, tmp_path / "style.safetensors")
    odd = save_lora(tensors, tmp_path / "style@256")
    assert loras_of(
        model, f"{file}:0.5@1", f"{file}@64", "someone/style@v2:x.safetensors:2@16", "a/b@v2", str(odd)
    ) == (
        Lora(source=str(file), weight=0.5, stages=1),
        Lora(source=str(file), stages=64),
        Lora(source="someone/style@v2:x.safetensors", weight=2.0, stages=16),
        Lora(source="a/b@v2:pytorch_lora_weights.safetensors"),
        Lora(source=str(odd)),
    )
    for word, message in (
        (
            f"{file}@upper",
            r"--lora style\.safetensors@upper: no stage refines a picture, the largest has 128; nearest: 128",
        ),
        (f"{file}@129", "no stage has 129 px along its longer side, the largest has 128; nearest: 128"),
        (f"{file}@0", "must be upper or a number of pixels, got 0; nearest: upper"),
        (f"{file}@lower", "with or without :WEIGHT, @upper or @PIXELS; there is no"),
    ):
        with pytest.raises(Refusal, match=message):
            loras_of(model, word)


def test_stages_of_a_request_know_their_loras(model: Path, tensors: Tensors, tmp_path: Path) -> None:
    file = save_lora(tensors, tmp_path / "style.safetensors")
    words = [str(file), f"{file}@upper", f"{file}:0.5@512"]
    request, *_ = settle(GenerateFlags(model=str(model), lora=words, device="cpu", res=512), Place(), CARDS)
    assert [stage.resting for stage in request.stages] == [("lora_1", "lora_2"), ("lora_2",), ()]


def test_a_prompt_is_read_once_for_all_stages(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    shapes = {f"{CLIP}__lora_down__weight": (4, 16), f"{CLIP}__lora_up__weight": (32, 4)}
    save_file(only(**shapes)({}), file)
    assert loras_of(model, str(file))
    with pytest.raises(
        Refusal, match="text encoders too, which read the prompt once for all stages, got @64; nearest: "
    ):
        loras_of(model, f"{file}@64")


@pytest.mark.parametrize(
    ("flux", "urae"),
    [
        (FLUX_DEV, "4k_adapter_lora_conversion_dev"),
        (FLUX_SCHNELL, "4k_adapter_lora_conversion_schnell"),
    ],
)
def test_short_names_are_for_upper_stages(flux: str, urae: str) -> None:
    """Names of files as the hub lists them."""
    files = {name: f"Huage001/URAE:urae_{file}.safetensors" for name, file in {"2k": "2k_adapter", "4k": urae}.items()}
    words = ["urae-4k", "urae-2k:0.8", "urae-4k@4096"]
    flags: dict[str, Any] = {"model": flux, "lora": words, "device": "cpu", "res": 4096}
    request, *_ = settle(GenerateFlags(**flags), Place(), CARDS)
    assert request.loras == (
        Lora(source=files["4k"], stages="upper"),
        Lora(source=files["2k"], weight=0.8, stages="upper"),
        Lora(source=files["4k"], stages=4096),
    )
    request, *_ = settle(GenerateFlags(**flags, cascade="off"), Place(), CARDS)
    assert request.loras[0] == Lora(source=files["4k"])
    with pytest.raises(Refusal, match=r"no stage refines a picture, the largest has 1024; nearest: 1024"):
        settle(GenerateFlags(**flags | {"res": 1024}), Place(), CARDS)


@pytest.mark.parametrize("other", ["demo", "someone/flux"])
def test_short_names_are_for_models_that_they_were_made_for(other: str) -> None:
    with pytest.raises(
        Refusal, match=r"urae-4k is for .*dev and .*schnell, got .*; nearest: --lora Huage001/URAE:urae_4k"
    ):
        loras_of(other, "urae-4k")
