"""The check before `generate`: what does not fit is refused in one line, with settings that do."""

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from clear_dist.cards.folder import find_model, read_folder
from clear_dist.commands.plan import planned_for
from clear_dist.families.cards import CARDS
from clear_dist.families.flux.card import FLUX_DEV, FLUX_SCHNELL
from clear_dist.launch.env import Place
from clear_dist.options import Refusal
from clear_dist.plan import Engine, fit_here, model
from clear_dist.request import devices
from clear_dist.request.flags import GenerateFlags, PlanFlags, UpscaleFlags
from clear_dist.request.settle import settle
from tests.plan.asked import flux_request, planned_model
from tests.tiny import make_tiny_flux, make_tiny_pipeline

ALONE = Place()


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets up GPUs, given the free GB of each."""

    def have(*free: float, name: str = "NVIDIA H100 80GB HBM3", capability: float = 9.0) -> None:
        kind = {"name": name, "capability": capability, "total": 85 * 10**9}
        found = tuple(devices.FoundGpu(**kind, free=round(each * 1e9)) for each in free)
        monkeypatch.setattr(devices, "find_gpus", lambda: found)
        monkeypatch.setattr(devices, "why_torch_sees_none", lambda: None)

    return have


@pytest.fixture(autouse=True)
def _one_engine(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    monkeypatch.setattr(fit_here, "Engine", lambda: engine)


def fit_lines(flags: GenerateFlags, place: Place) -> tuple[str, ...]:
    request, facts, _ = settle(flags, place, CARDS)
    check = fit_here.begin(request, facts, place)
    line = None if check is None else check.line()
    return () if line is None else (line,)


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
    with pytest.raises(
        Refusal, match=r"20\.0 GB that are free on GPU 1.*nearest: CUDA_VISIBLE_DEVICES=0 and --nproc 1 "
    ):
        lines_of(res=1024)
    gpus(84.0)
    with pytest.raises(Refusal, match=r"4 ranks must fit in the 84\.0 GB"):
        lines_of(res=1024, nproc=4)


def test_the_smallest_gpu_that_a_rank_uses_is_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"NVIDIA H100": 85 * 10**9, "NVIDIA GeForce RTX 4090": 25 * 10**9}
    found = tuple(devices.FoundGpu(name=name, capability=9.0, total=size, free=size) for name, size in sizes.items())
    monkeypatch.setattr(devices, "find_gpus", lambda: found)
    for nproc, expected in ((None, ("RTX4090", 25 * 10**9, 2)), (1, ("H100", 85 * 10**9, 1))):
        plan = planned_for(PlanFlags(model=FLUX_DEV, res=1024, nproc=nproc))
        plan.engine.stop()
        assert (plan.room.where, plan.room.bytes, plan.asked.ranks) == expected


def test_gpus_that_others_have_filled_are_left_out(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    two = {"rank": 0, "world_size": 2, "local_world_size": 2}
    gpus(84.0, 3.0, 84.0)
    with pytest.raises(
        Refusal, match=r"3\.0 GB that are free on GPU 1.*nearest: CUDA_VISIBLE_DEVICES=0,2 \(clear-dist"
    ):
        lines_of(Place(launcher="torchrun", **two), res=1024)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,3")
    with pytest.raises(Refusal, match=r"nearest: CUDA_VISIBLE_DEVICES=7,3 and --nproc 2 "):
        lines_of(res=1024)
    gpus(3.0, 84.0)
    with pytest.raises(Refusal, match=r"nearest: (?!CUDA)"):  # torchrun's two ranks would share one
        lines_of(Place(launcher="torchrun", **two), res=1024)


def test_smaller_weights_are_known(gpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs of 20 GB hold FLUX.1-dev in shards or in 8 bits, which it never has to be whole for; not as it is."""
    monkeypatch.chdir(tmp_path)
    gpus(*[20.0] * 8)
    for smaller in ({"shard_weights": True}, {"int8": True}, {"hoist_modulation": True}):
        assert not [line for line in lines_of(res=1024, **smaller) if "must fit" in line]
    for flags in ({}, {"offload": True}):
        with pytest.raises(Refusal, match=r"rank 0 must fit in the 20\.0 GB .*; nearest: --hoist-modulation "):
            lines_of(res=1024, **flags)


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
    """Rank 512 in a single block's three attention layers: 9.4 million numbers."""
    monkeypatch.chdir(tmp_path)
    layers = {f"transformer.single_transformer_blocks.0.attn.to_{letter}": (3072, 3072) for letter in "qkv"}
    shapes = {f"{name}.lora_A.weight": (512, inputs) for name, (_, inputs) in layers.items()}
    shapes |= {f"{name}.lora_B.weight": (outputs, 512) for name, (outputs, _) in layers.items()}
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "lora.safetensors")
    flags = PlanFlags(model=FLUX_DEV, res=1024, gpu="h100", lora=[str(tmp_path / "lora.safetensors")])
    plan = planned_for(flags)
    found = plan.memory.held(0)
    plan.engine.stop()
    assert found["LoRA"] == 2 * 3 * 2 * 512 * 3072


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


def test_a_small_picture_in_much_memory_needs_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fit_here, "Engine", Engine)
    monkeypatch.setattr(fit_here, "free_bytes", lambda: 8 * 10**9)
    for res, asks in ((256, False), (1536, True)):
        request, facts, _ = settle(GenerateFlags(model="demo", device="cpu", res=res), ALONE, CARDS)
        check = fit_here.begin(request, facts, ALONE)
        assert (check is not None) == asks
        if check is not None:
            assert check.line() is None
            assert check.plan.engine.process.poll() is not None, "its process has ended"


@pytest.mark.parametrize("guidance", [True, False])
def test_a_folder_is_planned_as_its_modules_are(guidance: bool, tmp_path: Path) -> None:
    pipe = make_tiny_pipeline(double_blocks=2, single_blocks=3, guidance_embeds=guidance)
    folder = make_tiny_flux(tmp_path / "tiny", double_blocks=2, single_blocks=3, guidance_embeds=guidance)
    found, expected = model.find(read_folder(folder, CARDS)), planned_model(pipe)
    assert found is not None
    assert (found.text, found.token, found.packing, found.channels) == (expected.text, 16, 2, 64)
    for mine, theirs in ((found.transformer, expected.transformer), (found.vae, expected.vae)):
        assert mine.kind == theirs.kind
        made = {name: list(value) if isinstance(value, tuple) else value for name, value in theirs.config.items()}
        assert {name: value for name, value in mine.config.items() if name in made} == {
            name: made[name] for name in mine.config if name in made
        }


@pytest.mark.parametrize(("name", "numbers"), [(FLUX_DEV, 11_901_408_320), (FLUX_SCHNELL, 11_891_178_560)])
def test_weights_of_flux(name: str, numbers: int, engine: Engine) -> None:
    known = model.find(find_model(name, CARDS, has_cuda=True))
    assert known is not None
    assert engine.weights(replace(flux_request(), model=known)).whole == 2 * numbers


def test_a_model_that_cannot_be_built_is_refused_with_the_reason(engine: Engine) -> None:
    asked = flux_request()
    wrong = replace(asked.model.transformer, config={"num_layers": "many"})
    with pytest.raises(Refusal, match=r"the model cannot be planned: .*FluxTransformer2DModel"):
        engine.weights(replace(asked, model=replace(asked.model, transformer=wrong)))
    unknown = replace(asked.model.transformer, kind="diffusers.NoSuchModel")
    with pytest.raises(Refusal, match=r"no NoSuchModel can be made"):
        engine.weights(replace(asked, model=replace(asked.model, transformer=unknown)))
    assert engine.weights(asked).held > 0, "it goes on answering"


def test_a_job_goes_on_where_nobody_knows(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(20.0)
    ended = Engine()
    ended.process.kill()
    monkeypatch.setattr(fit_here, "Engine", lambda: ended)
    (line,) = lines_of(res=1024)
    assert line.startswith("warning: whether it fits is not known: the engine cannot tell")


def test_a_choice_of_ranks_that_failed_is_told_as_the_picture_depends_on_it(
    gpus: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    gpus(*[84.0] * 8)
    request, facts, _ = settle(GenerateFlags(model=FLUX_DEV, output=Path("x.png"), res=1024), ALONE, CARDS)
    ended = Engine()
    ended.process.kill()
    monkeypatch.setattr(fit_here, "Engine", lambda: ended)
    assert fit_here.chosen_here(request, facts, ALONE) == (None, ())
    assert "warning: all ranks draw every stage, as whether fewer" in capsys.readouterr().err


def test_stages_of_all_pictures_may_have_fewer_ranks(
    gpus: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A picture among others is drawn as it is alone. Over a slow link one rank is the fastest."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(fit_here.LINKS, "nvlink", fit_here.LINKS["10gbe"])
    for name, height in (("a.png", 512), ("b.png", 640)):
        Image.new("RGB", (640, height)).save(name)
    gpus(*[84.0] * 8)
    kinds = [("a.png",), ("b.png",), ("a.png", "b.png")]
    flags = (UpscaleFlags(model=FLUX_DEV, images=["a fox", *files]) for files in kinds)
    settled = (settle(each, ALONE, CARDS) for each in flags)
    first, second, both = (fit_here.chosen_here(request, facts, ALONE)[1] for request, facts, _ in settled)
    assert (1024, 1280) in {each.size for each in first} and (1280, 1280) in {each.size for each in second}
    assert set(both) == {*first, *second}


def test_a_process_that_ended_is_told_of() -> None:
    engine = Engine()
    engine.process.kill()
    with pytest.raises(RuntimeError, match="cannot tell what it takes"):
        engine.weights(flux_request())
    engine.stop()
