"""The rotary embedding that is kept for a generation, beside unmodified transformers; its uses are counted."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from torch import Tensor, nn

from clear_dist.comm.group import Group
from clear_dist.engine.extrapolation import Extrapolation
from clear_dist.engine.striped import require_striped
from clear_dist.families.flux import positions
from clear_dist.parallelize import parallelize
from tests.oracle import Rotary
from tests.ranks import run_ranks
from tests.test_parallelize import relative_error
from tests.tiny import CLIP_WIDTH, ROPE_AXES, T5_WIDTH, make_tiny_pipeline

TEXT = 9
WITHIN = 1e-4


class Generation:
    """Inputs of one generation's forwards; text has positions of its own, which pipelines leave at 0."""

    def __init__(self, seed: int, height: int, width: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        self.tokens = height * width
        self.image_ids = torch.stack([torch.zeros_like(y), y, x], dim=-1).reshape(-1, 3).float()
        self.text_ids = self.drawn(TEXT, 3)

    def drawn(self, *shape: int) -> Tensor:
        return 3 * torch.randn(shape, generator=self.random)

    def step(self, text_ids: Tensor | None = None) -> dict[str, Any]:
        return {
            "hidden_states": self.drawn(1, self.tokens, 64),
            "encoder_hidden_states": self.drawn(1, TEXT, T5_WIDTH),
            "pooled_projections": self.drawn(1, CLIP_WIDTH),
            "timestep": torch.full((1,), 0.5),
            "guidance": torch.full((1,), 3.5),
            "img_ids": self.image_ids,
            "txt_ids": self.text_ids if text_ids is None else text_ids,
            "return_dict": False,
        }


class Pair:
    """A transformer on stripes beside an unmodified one, and how often each of its forwards embeds positions."""

    def __init__(self, group: Group, **options: Any) -> None:
        self.stock, self.pipe = make_tiny_pipeline().transformer, make_tiny_pipeline()
        self.pipe.scheduler.set_timesteps(6, mu=1.0)
        self.handle = parallelize(self.pipe, window="full", group=group, **options)
        self.errors: list[float] = []
        self.embedded: list[int] = []

    def step(self, given: dict[str, Any], tokens: int | None = None) -> None:
        """`tokens` of the picture: less than all, where references follow."""
        (expected,) = self.stock(**given)
        with mock.patch.object(FluxPosEmbed, "forward", autospec=True, side_effect=FluxPosEmbed.forward) as spy:
            (found,) = self.pipe.transformer(**given)
        self.errors.append(relative_error(found, expected[:, :tokens]))
        self.embedded.append(spy.call_count)

    @property
    def known(self) -> int:
        return len(require_striped(self.pipe).family.positions._known)


def generations(group: Group, text_tokens: str) -> tuple[list[float], list[int], list[int]]:
    """Latents of two sizes, one after the other and in turns; with other text ids in between; twice with the same text ids."""
    pair, known = Pair(group, text_tokens=text_tokens), []
    with torch.inference_mode():
        one, other = Generation(1, 13, 5), Generation(2, 8, 7)
        for generation in (one, one, other, other, one, other, one):
            pair.step(generation.step())
    negative = one.drawn(TEXT, 3)
    with torch.no_grad():  # outside of inference mode, with what was made within
        for text_ids in (None, negative, None, negative, one.text_ids[None]):
            pair.step(one.step(text_ids))
        negative.mul_(2)
        pair.step(one.step(negative))
        other.text_ids = one.text_ids
        for generation in (other, one):
            pair.step(generation.step())
    known.append(pair.known)
    del one, other, generation, negative, text_ids
    gc.collect()
    known.append(pair.known)
    pair.handle.undo()
    assert type(pair.pipe.transformer.pos_embed) is FluxPosEmbed
    return pair.errors, pair.embedded, known


@pytest.mark.parametrize(("size", "text_tokens"), [(1, "auto"), (2, "sharded"), (3, "replicated")])
def test_generations_of_other_sizes_and_texts_are_the_stock_transformer_s(size: int, text_tokens: str) -> None:
    for errors, embedded, known in run_ranks(generations, size, text_tokens):
        assert max(errors) < WITHIN
        in_turns, texts, changed, shared = [1, 0, 1, 0, 0, 0, 0], [0, 1, 0, 0, 1], [1], [1, 1]
        assert embedded == in_turns + texts + changed + shared
        assert known[1] == 0 < known[0], "a generation that has ended leaves nothing"


def with_references(group: Group) -> list[float]:
    """Errors of generations with the same text ids: references, others of as many, none, and another width.

    Ranks share text and references out: rank 0 of 3 has only text, and another part of it without references.
    """
    pair, generation = Pair(group, text_tokens="sharded"), Generation(5, 8, 7)
    whole, tokens = generation.image_ids, generation.tokens
    with torch.no_grad():
        for count, place in ((TEXT, 0), (TEXT, 20), (0, 0), (2 * TEXT, 5)):
            references = torch.tensor([1.0, place, place]) + torch.arange(count)[:, None] * torch.tensor([0, 0, 1])
            generation.image_ids, generation.tokens = torch.cat([whole, references]), tokens + count
            pair.step(generation.step(), tokens)
        wider = Generation(6, 8, 9)
        wider.text_ids = generation.text_ids
        for each in (wider, generation):
            pair.step(each.step(), each.tokens if each is wider else tokens)
    return pair.errors


@pytest.mark.parametrize("size", [1, 3])
def test_references_and_shares_of_the_same_text_have_their_own_positions(size: int) -> None:
    for errors in run_ranks(with_references, size):
        assert max(errors) < WITHIN


def extrapolated(group: Group) -> tuple[list[float], list[float]]:
    """Errors with one generation's ids at, above and at the native size again; and what the stock base would err."""
    pair, generation = Pair(group), Generation(3, 8, 7)
    how = Extrapolation(native_tokens=8 * 7, ntk_factor=10, position_scale=0.4)  # so many keys that scores stay
    stock = pair.stock.pos_embed
    apart = []
    with torch.no_grad():
        for extrapolation in (None, how, how, None):
            above = extrapolation is not None
            pair.stock.pos_embed = Rotary(ROPE_AXES[16], theta=100_000, position_scale=1.0) if above else stock
            with require_striped(pair.pipe).running(extrapolation=how) if above else nullcontext():
                given = generation.step()
                scaled = given | {"img_ids": given["img_ids"] * 0.4} if above else given
                (expected,), (as_trained,) = pair.stock(**scaled), make_tiny_pipeline().transformer(**given)
                (found,) = pair.pipe.transformer(**given)
            pair.errors.append(relative_error(found, expected))
            apart.append(relative_error(as_trained, expected))
    return pair.errors, apart


@pytest.mark.parametrize("size", [1, 2])
def test_the_same_ids_above_the_native_size_are_embedded_anew(size: int) -> None:
    for errors, apart in run_ranks(extrapolated, size):
        assert max(errors) < WITHIN
        assert [each > 100 * WITHIN for each in apart] == [False, True, True, False]


@contextmanager
def as_it_is(embed: nn.Module) -> Iterator[None]:
    yield


@contextmanager
def doubled(embed: nn.Module) -> Iterator[None]:
    """Another's hook changes the ids."""
    hook = embed.register_forward_pre_hook(lambda module, given: (2 * given[0],))
    yield
    hook.remove()


@pytest.mark.parametrize("most", [8 * 7, 8 * 7 - 1])
@pytest.mark.parametrize("changed", [as_it_is, doubled])
def test_what_is_kept_is_little_and_only_the_transformer_s_own(
    most: int, changed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(positions, "MOST_REMEMBERED", most)
    pair, generation = Pair(Group.create(torch.device("cpu"))), Generation(4, 8, 7)
    with torch.no_grad(), changed(pair.stock.pos_embed), changed(pair.pipe.transformer.pos_embed):
        for _ in range(3):
            pair.step(generation.step())
    is_kept = most == 8 * 7 and changed is as_it_is
    assert pair.embedded == ([1, 0, 0] if is_kept else [1, 1, 1]) and pair.known == is_kept
    assert max(pair.errors) < WITHIN
    pair.handle.undo()
