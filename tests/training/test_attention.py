"""Windowed attention that trains against dense attention under a mask, in stock processors of all families."""

import pytest
import torch
from torch import Tensor

from clear_dist.training.attention import Layout
from clear_dist.training.patterns import circle
from clear_dist.training.patterns.circle import Circle


def dense(query: Tensor, key: Tensor, value: Tensor, layout: Layout, radius: int, weight: Tensor | None) -> Tensor:
    """Softmax over every key, by a mask made token by token; pooled keys by a loop."""
    count, image = query.shape[2], layout.image
    text = count - image
    first = text if layout.text_first else 0
    places = {first + i: divmod(i, layout.width) for i in range(image)}
    factor = 1 if weight is None else weight.shape[3]
    pools = [
        [first + (y + a) * layout.width + x + b for a in range(factor) for b in range(factor)]
        for y in range(0, layout.height, factor)
        for x in range(0, layout.width, factor)
    ]
    if weight is not None:
        flat = weight.flatten()
        key, value = (
            torch.cat(
                [x, torch.stack([sum(w * x[:, :, i] for w, i in zip(flat, pool, strict=True)) for pool in pools], 2)], 2
            )
            for x in (key, value)
        )
    seen = torch.zeros(count, key.shape[2], dtype=torch.bool)
    for i in range(count):
        for j in range(key.shape[2]):
            if j >= count:
                seen[i, j] = i in places
            elif i in places and j in places:
                (y, x), (v, u) = places[i], places[j]
                seen[i, j] = (y - v) ** 2 + (x - u) ** 2 < radius**2
            else:
                seen[i, j] = True
    scores = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
    return scores.softmax(dim=-1) @ value


@pytest.mark.parametrize(("height", "width", "radius", "factor"), [(6, 8, 3, 2), (9, 5, 4, 1), (4, 4, 9, 4)])
@pytest.mark.parametrize("text_first", [True, False])
def test_output_and_gradients_are_those_of_dense_attention(
    monkeypatch: pytest.MonkeyPatch, height: int, width: int, radius: int, factor: int, text_first: bool
) -> None:
    monkeypatch.setattr(circle, "SMALL", 20)
    monkeypatch.setattr(circle, "TILE", 3)
    layout = Layout(layer=0, height=height, width=width, text_first=text_first)
    pattern = Circle(radius=radius, down_factor=factor)
    learned = {name: torch.rand_like(x) for name, x in pattern.parameters(layout, 2, 8).items()}
    inputs = [torch.randn(2, 2, 5 + height * width, 8) for _ in range(3)]
    results = []
    for attend in (
        lambda *qkv, weight: pattern(*qkv, layout, {} if weight is None else {circle.WEIGHT: weight}),
        lambda *qkv, weight: dense(*qkv, layout, radius, weight),
    ):
        leaves = [x.clone().requires_grad_() for x in (*inputs, *learned.values())]
        out = attend(*leaves[:3], weight=leaves[3] if learned else None)
        torch.manual_seed(0)
        (out * torch.randn_like(out)).sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for mine, wanted in zip(*results, strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-4, rtol=1e-4)
