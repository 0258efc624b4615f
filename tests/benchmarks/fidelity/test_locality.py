"""Shares of attention in a circle by a double loop, and rotary distances changed pair by pair."""

import math

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.fidelity import perturbed, shares
from benchmarks.fidelity.perturbed import Perturbed
from clear_dist.training.attention import Layout

HEIGHT, WIDTH, TEXT, AXES = 3, 4, 2, (2, 4, 6)
PLACES = [divmod(index, WIDTH) for index in range(HEIGHT * WIDTH)]
LAYOUT = Layout(layer=0, height=HEIGHT, width=WIDTH, text_first=True)


def weights() -> Tensor:
    return torch.rand(2, 3, TEXT + len(PLACES), TEXT + len(PLACES)).softmax(dim=-1)


@pytest.mark.parametrize("text_first", [True, False])
def test_shares_are_those_of_a_double_loop(text_first: bool) -> None:
    given = weights()
    layout = Layout(layer=0, height=HEIGHT, width=WIDTH, text_first=text_first)
    first = TEXT if text_first else 0
    look = shares.looked(given, layout)
    for radius in (1, 2, 3, 9):
        near, everywhere = torch.zeros(3), torch.zeros(3)
        for i, (y, x) in enumerate(PLACES):
            for j, (v, u) in enumerate(PLACES):
                seen = given[:, :, first + i, first + j].mean(dim=0)
                everywhere += seen
                near += seen * ((y - v) ** 2 + (x - u) ** 2 < radius**2)
        torch.testing.assert_close(look.within(radius), near / everywhere)
    torch.testing.assert_close(look.text, 1 - everywhere / len(PLACES))


def test_offsets_are_from_the_query_to_its_keys() -> None:
    given = torch.zeros(1, 1, TEXT + len(PLACES), TEXT + len(PLACES))
    given[..., TEXT + PLACES.index((0, 1)), TEXT + PLACES.index((2, 0))] = 1.0
    (place,) = shares.looked(given, LAYOUT).offsets[0].nonzero().tolist()
    assert place == [HEIGHT - 1 + 2, WIDTH - 1 - 1]


def test_uniform_attention_is_that_of_equal_weights() -> None:
    equal = shares.looked(torch.full_like(weights(), 1.0), LAYOUT)
    for radius in (1, 2, 3):
        torch.testing.assert_close(shares.uniform(HEIGHT, WIDTH).within(radius), equal.within(radius)[:1])


def test_the_first_pass_of_chosen_steps_is_recorded_and_nothing_changed() -> None:
    recorder = shares.Recorder(steps=frozenset({1}), passes=2)
    inputs = [torch.randn(1, 2, TEXT + len(PLACES), 12) for _ in range(3)]
    layers = [Layout(layer=layer, height=HEIGHT, width=WIDTH, text_first=True) for layer in range(2)]
    for _ in range(2):
        recorder.begin()
        for _step in range(3):
            for scale in (1.0, 5.0):  # the second pass of guidance
                for layout in layers:
                    query = scale * inputs[0]
                    out = recorder(query, *inputs[1:], layout, {})
                    torch.testing.assert_close(out, scaled_dot_product_attention(query, *inputs[1:]))
    assert {place: len(found) for place, found in recorder.looks.items()} == {(1, 0): 2, (1, 1): 2}
    scores = (inputs[0] @ inputs[1].transpose(2, 3) / math.sqrt(12)).softmax(dim=-1)
    expected = scores[0, :, TEXT:, :TEXT].sum(dim=2).mean(dim=1)
    torch.testing.assert_close(shares.together(recorder.looks[1, 0]).text, expected)


def turned(x: Tensor, place: tuple[float, float]) -> Tensor:
    """Channels [D] turned pair by pair, by complex numbers: first those without a place, then rows', then columns'."""
    parts = []
    for size, position, part in zip(AXES, (0.0, *place), x.split(AXES), strict=True):
        angles = torch.tensor([position * 10_000 ** (-2 * i / size) for i in range(size // 2)], dtype=torch.float64)
        parts.append(torch.view_as_real(torch.view_as_complex(part.unflatten(0, (-1, 2))) * torch.exp(1j * angles)))
    return torch.cat([part.flatten() for part in parts])


def changed(distance: int, kind: str, radius: int) -> int:
    if kind == "clipped":
        return max(-radius, min(radius, distance))
    return distance if abs(distance) >= radius else (-radius if distance < 0 else radius)


@pytest.mark.parametrize(("kind", "radius"), [("clipped", 1), ("raised", 2), ("clipped", 2)])
def test_rotary_distances_are_changed_pair_by_pair(kind: str, radius: int) -> None:
    query, key, value = (torch.randn(1, 1, TEXT + len(PLACES), sum(AXES), dtype=torch.float64) for _ in range(3))
    places = [(0, 0)] * TEXT + PLACES
    scores = torch.empty(len(places), len(places), dtype=torch.float64)
    for i, here in enumerate(places):
        for j, there in enumerate(places):
            away = [to - at for at, to in zip(here, there, strict=True)]
            if min(i, j) >= TEXT:
                away = [changed(each, kind, radius) for each in away]
            scores[i, j] = query[0, 0, i] @ turned(key[0, 0, j], (away[0], away[1]))
    expected = (scores / math.sqrt(sum(AXES))).softmax(dim=-1) @ value[0, 0]
    rotated = [
        torch.stack([turned(x[0, 0, i], place) for i, place in enumerate(places)])[None, None].float()
        for x in (query, key)
    ]
    pattern = Perturbed.by(kind, radius, FluxPosEmbed(theta=10_000, axes_dim=list(AXES)))
    out = pattern(*rotated, value.float(), LAYOUT, {})
    torch.testing.assert_close(out[0, 0], expected.float(), atol=1e-5, rtol=1e-5)


def test_distances_below_and_above_a_radius() -> None:
    distances = torch.arange(-3.0, 4)
    assert perturbed.clipped(distances, radius=2).tolist() == [-2, -2, -1, 0, 1, 2, 2]
    assert perturbed.raised(distances, radius=2).tolist() == [-3, -2, -2, 2, 2, 2, 3]
