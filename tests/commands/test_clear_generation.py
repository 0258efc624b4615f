"""Whole pictures with a CLEAR checkpoint: stages and stripes in units of its down-sampled keys, and what is reported."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import FluxPipeline
from PIL import Image

import clear_dist
from clear_dist import hub
from clear_dist.comm.group import Group
from clear_dist.families.cards import CARDS
from clear_dist.hub.fetching import Wanted
from clear_dist.launch.env import Place
from clear_dist.options import Refusal
from clear_dist.request.flags import GenerateFlags, UpscaleFlags
from clear_dist.request.settle import settle
from tests.commands.test_generate import start_on_ranks
from tests.ranks import run_ranks
from tests.tiny import make_clear_weights, make_tiny_flux, make_tiny_pipeline

ALONE = Place()
NATIVE, SIZE, UNIT = 64, {"height": 320, "width": 192}, 64
SETTINGS: dict[str, Any] = {"num_inference_steps": 2, "max_sequence_length": 9, "seed": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_flux(tmp_path_factory.mktemp("model"), sample_size=NATIVE)
    transformer = FluxPipeline.from_pretrained(folder).transformer
    make_clear_weights(transformer, folder / "clear_local_2_down_4.safetensors", down_factor=4)
    return folder


def drawn(group: Group, file: Path) -> tuple[list[np.ndarray], list[tuple[int, int]]]:
    """From noise, and from a picture; the stripes of the last stage, in tokens."""
    pipe = make_tiny_pipeline(sample_size=NATIVE)
    pipe.set_progress_bar_config(disable=True)
    handle = clear_dist.parallelize(pipe, clear_weights=file, text_attention="exact", group=group)
    pictures = clear_dist.generate(pipe, "a hill", **SIZE, **SETTINGS)
    picture = Image.fromarray(np.random.default_rng(5).integers(0, 256, (76, 62, 3), dtype=np.uint8))
    settings = {name: value for name, value in SETTINGS.items() if name != "num_inference_steps"}
    pictures += clear_dist.upscale(pipe, picture, "a hill", **SIZE, **settings)
    return [np.asarray(picture) for picture in pictures], handle.stripes


def test_a_cascade_on_three_ranks_is_that_on_one(model: Path) -> None:
    """Stages of 1, 2 or 3, and 5 units of rows: in the first ones ranks are idle."""
    file = model / "clear_local_2_down_4.safetensors"
    ((alone, _),) = run_ranks(drawn, 1, file)
    (together, stripes), *_ = run_ranks(drawn, 3, file)
    assert stripes == [(0, 8), (8, 16), (16, 20)]
    assert len(alone) == len(together) == 2
    for one, three in zip(alone, together, strict=True):
        assert one.shape == three.shape == (SIZE["height"], SIZE["width"], 3)
        difference = np.abs(one.astype(int) - three.astype(int))
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_all_stages_are_whole_units(model: Path, tmp_path: Path) -> None:
    request, *_ = settle(GenerateFlags(model=str(model), height=640, width=448), ALONE, CARDS)
    assert (request.window, request.down_factor, request.unit) == (2, 4, UNIT)
    sizes = [stage.size for stage in request.stages]
    assert sizes[-1] == (640, 448) and len(sizes) > 2
    assert all(side % UNIT == 0 for size in sizes for side in size)
    Image.new("RGB", (100, 75)).save(tmp_path / "x.png")
    enlarging = UpscaleFlags(model=str(model), images=[str(tmp_path / "x.png")])
    request, *_ = settle(enlarging, ALONE, CARDS)
    assert request.size == (192, 256)  # twice the longer side is 200
    with pytest.raises(Refusal, match=r"--res must be a multiple of 64 pixels \(4 tokens, .* nearest: 192 or 256"):
        settle(UpscaleFlags(model=str(model), images=[str(tmp_path / "x.png")], res=240), ALONE, CARDS)
    full, *_ = settle(GenerateFlags(model=str(model), res=240, window="full"), ALONE, CARDS)
    assert (full.down_factor, full.clear_weights) == (1, None)


def test_what_was_replaced_is_told_and_reported(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = Path(shutil.copy(model / "clear_local_2_down_4.safetensors", tmp_path))
    process = start_on_ranks(model, "--clear-weights", str(file), "--nproc", "2", "--res", "128", "--report", "r.json")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    told = "clear-dist: CLEAR weights: clear_local_2_down_4.safetensors (radius 2, down factor 4), "
    assert [line for line in errors.splitlines() if "CLEAR" in line] == [told + "14 tensors in 2 layers replaced"]
    report = json.loads(Path("r.json").read_text())
    expected = {"file": str(file), "radius": 2, "down_factor": 4, "tensors": 14, "layers": 2}
    assert report["clear_weights"] == expected
    assert report["stripes"] == [[0, 4], [4, 8]]
    # 64 px: one unit, and one rank idle; then two layers a step, to one other rank.
    assert [rank["pooled_messages_sent"] for rank in report["comm"]] == [[0, 0, 2], [0, 0, 2]]


def test_a_file_of_the_hub_is_fetched_at_its_revision_and_checked(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is played by folders."""
    file = "clear_local_2_down_4.safetensors"
    fetched = {revision: tmp_path / revision for revision in ("v1", "v2")}
    for folder in fetched.values():
        folder.mkdir()
    shutil.copy(model / file, fetched["v1"])
    make_clear_weights(make_tiny_pipeline(single_blocks=2).transformer, fetched["v2"] / file, down_factor=4)
    asked: list[tuple[str, str, str | None]] = []

    def fetch(wants: Sequence[Wanted], *, quiet: bool) -> None:
        asked.extend((want.repository, want.needed, want.revision) for want in wants)

    monkeypatch.setattr(hub, "fetch", fetch)
    monkeypatch.setattr(hub, "cached", lambda want: fetched[want.revision])
    requests = {
        revision: settle(
            GenerateFlags(model=str(model), clear_weights=f"o/n@{revision}:{file}", device="cpu"),
            ALONE,
            CARDS,
        )[0]
        for revision in fetched
    }
    group = Group.create("cpu")
    try:
        located = hub.locate(requests["v1"], group, CARDS, local_rank=0)
        assert (located.clear_weights, located.down_factor) == (str(fetched["v1"] / file), 4)
        assert asked == [("o/n", file, "v1")]
        with pytest.raises(Refusal, match=r"unexpected tensor single_transformer_blocks\.1\.attn"):
            hub.locate(requests["v2"], group, CARDS, local_rank=0)
    finally:
        group.close()
