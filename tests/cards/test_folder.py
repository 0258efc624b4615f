from pathlib import Path

from clear_dist.cards.folder import find_model
from clear_dist.families.cards import CARDS
from clear_dist.families.flux.card import FLUX_DEV, FLUX_SCHNELL
from tests.tiny import make_tiny_flux


def test_defaults_fit_the_model(tmp_path: Path) -> None:
    original = make_tiny_flux(tmp_path / "dev")
    schnell = make_tiny_flux(tmp_path / "schnell", guidance_embeds=False)
    facts = {
        name: find_model(name, CARDS, has_cuda=False) for name in (str(original), str(schnell), FLUX_DEV, FLUX_SCHNELL)
    }
    found = {
        name: (fact.sampling.steps, fact.sampling.guidance_scale, fact.max_sequence_length)
        for name, fact in facts.items()
    }
    assert found[str(original)] == found[FLUX_DEV] == (28, 3.5, 512)
    assert found[str(schnell)] == found[FLUX_SCHNELL] == (4, 0.0, 256)
    assert facts[str(original)].native_size == 128
    assert find_model("auto", CARDS, has_cuda=False).is_demo
    assert find_model("auto", CARDS, has_cuda=True).location == FLUX_DEV
