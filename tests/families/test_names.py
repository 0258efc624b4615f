"""Short names of models, and what one family's files are for another: by all cards there are."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clear_dist.commands.app import run
from clear_dist.families.cards import CARDS
from clear_dist.families.flux.card import FLUX_DEV
from clear_dist.launch.env import Place
from clear_dist.options import Refusal
from clear_dist.request.flags import GenerateFlags
from clear_dist.request.settle import settle
from clear_dist.stages import Sampling, Stage
from tests.families.test_cards import BOTH
from tests.plan.asked import flux
from tests.stand_in import write_safetensors


def test_short_names_stand_for_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("clear_dist.request.settle.find_spec", lambda package: object())
    assert len(CARDS.short_names) == len(set(CARDS.short_names)) == len(CARDS.hub_ids), "each model has one"
    for name, hub_id in zip(CARDS.short_names, CARDS.hub_ids, strict=True):
        request, facts, _ = settle(GenerateFlags(model=name, device="cpu", clear_weights="none"), Place(), CARDS)
        assert (request.model, facts.name) == (hub_id, hub_id)
    with pytest.raises(
        Refusal, match=r"--model must be auto, demo, flux-dev, .*there is no flux-dv; nearest: flux-dev"
    ):
        settle(GenerateFlags(model="flux-dv", device="cpu"), Place(), CARDS)
    (tmp_path / "flux-dev").mkdir()
    with pytest.raises(Refusal, match="got the empty folder flux-dev"):
        settle(GenerateFlags(model="flux-dev", device="cpu"), Place(), CARDS)


@pytest.mark.parametrize("document", ["README.md", "docs/models.md"])
def test_short_names_are_in_the_documents(document: str) -> None:
    text = (Path(__file__).parents[2] / document).read_text()
    assert [name for name in CARDS.short_names if f"`{name}`" not in text] == []


def test_short_names_are_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"Short names of models: {', '.join(CARDS.short_names)}." in shown


def test_clear_weights_of_another_family_are_refused(tmp_path: Path) -> None:
    flux_dev = CARDS.on_hub(FLUX_DEV)
    assert flux_dev is not None
    file = tmp_path / "clear_local_8.safetensors"
    write_safetensors(file, flux_dev[1].shape.clear_tensors(), torch.bfloat16)
    for word in (str(file), "Huage001/CLEAR:clear_local_8.safetensors", "Huage001/CLEAR"):
        flags = GenerateFlags(model="someone/second", clear_weights=word, device="cpu")
        with pytest.raises(Refusal, match=r"must be for someone/second, got .*, which is for black-forest-labs/FLUX"):
            settle(flags, Place(), BOTH)


def test_guidance_of_both_kinds_is_planned() -> None:
    stage, model = Stage(height=64, width=64, sampling=Sampling(true_cfg_scale=2.0)), flux().model
    apart = replace(flux(), model=replace(model, further_text_tokens=77))
    together = replace(flux(), model=replace(model, guides_in_one_pass=True))
    assert [(each.passes(stage), each.images(stage)) for each in (apart, together)] == [(2, 1), (1, 2)]
    assert apart.text_tokens == together.text_tokens + 77 == 512 + 77
