"""A FLUX whose VAE makes tokens of 32 pixels: nothing but the pipeline says how large they are."""

from pathlib import Path
from typing import Any

import pytest

import clear_dist
from clear_dist.comm.group import Group
from clear_dist.drawing.cascade import Cascade
from clear_dist.drawing.prompts import encode_prompts
from clear_dist.engine.striped import require_striped
from clear_dist.families.cards import CARDS
from clear_dist.families.transformers import adapter_of
from clear_dist.launch.env import Place
from clear_dist.options import Refusal
from clear_dist.request.flags import GenerateFlags
from clear_dist.request.settle import settle
from tests.drawing.stock_cascade import stock, two_stages
from tests.drawing.test_cascade import TEXT, relative_error
from tests.ranks import run_ranks
from tests.refining.drawing import PROMPT, SEED, Drawn, picture_of
from tests.tiny import make_tiny_flux, make_tiny_pipeline

NATIVE = 128
LOWER, UPPER = two_stages((128, 128), (224, 192))


def tiny() -> Any:
    pipe = make_tiny_pipeline(sample_size=NATIVE, vae_blocks=5)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(group: Group) -> Drawn:
    pipe = tiny()
    clear_dist.parallelize(pipe, group=group, window="full")
    counters = require_striped(pipe).counters
    embeddings = encode_prompts(adapter_of(pipe), group, counters, [PROMPT], max_sequence_length=TEXT)
    cascade = Cascade(pipe, embeddings, seed=SEED)
    return [(each.latents, each.pixels) for each in cascade.run((LOWER, UPPER))]


def test_a_cascade_is_stock_diffusers() -> None:
    found = run_ranks(drawn, 2)
    # It counts tokens of 16 pixels.
    lower, upper = stock(tiny(), picture_of(found, 0), (LOWER, UPPER), counted=2)
    for rank in found:
        assert relative_error(rank[0][0], lower) < 1e-4
        assert relative_error(rank[1][0], upper) < 1e-4


def test_a_request_is_in_these_tokens(tmp_path: Path) -> None:
    model = make_tiny_flux(tmp_path / "model", sample_size=NATIVE, vae_blocks=5)
    flags: dict[str, Any] = {"model": str(model), "device": "cpu"}
    request, facts, _ = settle(GenerateFlags(**flags, res=384), Place(), CARDS)
    assert (request.token_size, facts.native_size, request.unit) == (32, NATIVE, 32)
    assert [stage.size for stage in request.stages] == [(128, 128), (224, 224), (384, 384)]
    with pytest.raises(Refusal, match=r"must be a multiple of 32 pixels \(one token\), got 144; nearest: 128 or 160"):
        settle(GenerateFlags(**flags, res=144), Place(), CARDS)
