"""The check before `generate`: what does not fit is refused in one line, with settings that do."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from clear_dist.cards.folder import find_model, read_folder
from clear_dist.commands.plan import planned_for
from clear_dist.families.cards import CARDS
from clear_dist.families.flux.card import FLUX_DEV, FLUX_SCHNELL
from clear_dist.launch.env import Place
from clear_dist.options import Refusal
from clear_dist.plan import fit_here, sizes
from clear_dist.request import devices
from clear_dist.request.flags import GenerateFlags, PlanFlags
from clear_dist.request.settle import settle
from tests.plan.sizes import sizes_of
from tests.tiny import make_tiny_flux, make_tiny_pipeline

ALONE = Place()


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """So many GPUs with so much of their memory free, in GB."""

    def have(*free: float, name: str = "NVIDIA H100 80GB HBM3") -> None:
        found = tuple(devices.FoundGpu(name=name, total=85 * 10**9, free=round(each * 1e9)) for each in free)
        monkeypatch.setattr(devices, "find_gpus", lambda: found)
        monkeypatch.setattr(devices, "count_gpus", lambda: len(found))

    return have


def fit_lines(flags: GenerateFlags, place: Place) -> tuple[str, ...]:
    request, facts, _ = settle(flags, place, CARDS)
    return fit_here.require(request, facts, place)


def lines_of(place: Place = ALONE, **given: Any) -> tuple[str, ...]:
    return fit_lines(GenerateFlags(model=FLUX_DEV, output=Path("x.png"), **given), place)


def test_what_fits_is_not_mentioned(gpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    gpus(*[84.0] * 8)
    assert not [line for line in lines_of(res=8192) if "must fit" in line]


def test_what_does_not_fit_is_refused_with_settings_that_do(gpus: Any) -> None:
    gpus(*[20.0] * 8)
    with pytest.raises(
        Refusal, match=r"rank 0 must fit in the 20\.0 GB .* free on GPU 0, got .*; nearest: --"
    ) as refused:
        lines_of(res=2048)
    flags = re.search(r"nearest: (.*) \(clear-dist plan", str(refused.value))
    assert flags is not None and "--nproc" not in flags[1]  # there are no more GPUs
    words = flags[1].split()
    given = {word.removeprefix("--").replace("-", "_"): True for word in words if word.startswith("--")}
    for word, value in pairwise(words):
        if not value.startswith("--"):
            given[word.removeprefix("--")] = int(value)
    lines_of(**({"res": 2048} | given))


def test_what_may_not_fit_is_drawn_with_a_warning(gpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    gpus(25.0)
    assert [line for line in lines_of(res=1024) if "warning: rank 0 must fit in the 25.0 GB" in line]


def test_the_fullest_gpu_counts_and_ranks_that_share_one_add_up(gpus: Any) -> None:
    gpus(84.0, 20.0)
    with pytest.raises(Refusal, match=r"20\.0 GB that are free on GPU 1"):
        lines_of(res=1024)
    gpus(84.0)
    with pytest.raises(Refusal, match=r"4 ranks must fit in the 84\.0 GB"):
        lines_of(res=1024, nproc=4)


def test_smaller_weights_are_known(gpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 GPUs of 24 GB hold FLUX.1-dev in shards, not whole, nor made smaller once it is there."""
    monkeypatch.chdir(tmp_path)
    gpus(*[23.6] * 8)
    assert not [line for line in lines_of(res=2048, shard_weights=True) if "must fit" in line]
    assert not [line for line in lines_of(res=1024, shard_weights=True, int8=True) if "must fit" in line]
    gpus(*[20.0] * 8)
    for flags in ({}, {"int8": True}, {"hoist_modulation": True}, {"offload": True}):
        with pytest.raises(Refusal, match=r"rank 0 must fit in the 20\.0 GB .*; nearest: --shard-weights "):
            lines_of(res=2048, **flags)


def test_text_encoders_that_stay_are_known(gpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """9.8 GB more on rank 0, unless they are in host memory."""
    monkeypatch.chdir(tmp_path)
    gpus(30.0)
    assert not [line for line in lines_of(res=1024) if "must fit" in line]
    with pytest.raises(Refusal, match=r"nearest: without --keep-text-encoder "):
        lines_of(res=1024, keep_text_encoder=True)
    gpus(40.0)
    assert not [line for line in lines_of(res=1024, keep_text_encoder=True) if "must fit" in line]


def test_lora_are_known(gpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rank 512 in a single block's three attention layers: 9.4 million numbers."""
    monkeypatch.chdir(tmp_path)
    layers = {f"transformer.single_transformer_blocks.0.attn.to_{letter}": (3072, 3072) for letter in "qkv"}
    shapes = {f"{name}.lora_A.weight": (512, inputs) for name, (_, inputs) in layers.items()}
    shapes |= {f"{name}.lora_B.weight": (outputs, 512) for name, (outputs, _) in layers.items()}
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "lora.safetensors")
    flags = PlanFlags(model=FLUX_DEV, res=1024, gpu="h100", lora=[str(tmp_path / "lora.safetensors")])
    found = planned_for(flags).ranks[0].drawing
    assert found.items["LoRA"] == 2 * 3 * 2 * 512 * 3072


def test_an_unknown_gpu_is_judged_by_its_memory(gpus: Any) -> None:
    gpus(20.0, name="NVIDIA Something")
    with pytest.raises(Refusal, match=r"20\.0 GB"):
        lines_of(res=1024)


def test_one_rank_of_a_machine_looks(gpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others may look when it has begun to load."""
    monkeypatch.chdir(tmp_path)
    gpus(1.0, 1.0)
    lines_of(Place(rank=1, local_rank=1, world_size=2, local_world_size=2, launcher="torchrun"))
    with pytest.raises(Refusal):
        lines_of(Place(rank=0, local_rank=0, world_size=2, local_world_size=2, launcher="torchrun"))


def test_a_cpu_is_shared_by_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fit_here, "free_bytes", lambda: 8 * 10**8)
    flags = GenerateFlags(model="demo", device="cpu", nproc=8)
    with pytest.raises(
        Refusal, match=r"8 ranks must fit in the 0\.8 GB that are free on this machine, .*; nearest: --nproc 2 "
    ):
        fit_lines(flags, ALONE)
    monkeypatch.setattr(fit_here, "free_bytes", lambda: 12 * 10**8)
    assert [line for line in fit_lines(flags, ALONE) if "warning: 8 ranks must fit in the 1.2 GB" in line]
    monkeypatch.setattr(fit_here, "free_bytes", lambda: 8 * 10**9)
    assert not [line for line in fit_lines(flags, ALONE) if "must fit" in line]


def test_models_whose_sizes_are_not_known_are_not_judged(gpus: Any) -> None:
    gpus(1.0)
    fit_lines(GenerateFlags(model="someone/flux-like", clear_weights="none"), ALONE)


@pytest.mark.parametrize("guidance", [True, False])
def test_sizes_of_a_folder(guidance: bool, tmp_path: Path) -> None:
    pipe = make_tiny_pipeline(double_blocks=2, single_blocks=3, guidance_embeds=guidance)
    folder = make_tiny_flux(tmp_path / "tiny", double_blocks=2, single_blocks=3, guidance_embeds=guidance)
    assert sizes.find(read_folder(folder, CARDS)) == sizes_of(pipe)


def test_sizes_of_flux() -> None:
    dev, schnell = (sizes.find(find_model(name, CARDS, has_cuda=True)) for name in (FLUX_DEV, FLUX_SCHNELL))
    assert dev is not None and schnell is not None
    assert dev.numbers == 11_901_408_320
    assert schnell.numbers == 11_891_178_560
