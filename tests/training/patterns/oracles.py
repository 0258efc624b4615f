"""The patterns again, query by query and key by key in float64, from the paper's equations alone."""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import product
from math import dist, sqrt

import torch
from torch import Tensor

Place = tuple[int, int]


def places(height: int, width: int) -> list[Place]:
    return list(product(range(height), range(width)))


def in_circle(query: Place, key: Place, size: int, layer: int) -> bool:
    return dist(query, key) < size


def in_square(query: Place, key: Place, size: int, layer: int) -> bool:
    return max(abs(query[0] - key[0]), abs(query[1] - key[1])) < size


def in_window(query: Place, key: Place, size: int, layer: int) -> bool:
    first = -(size // 2) if layer % 2 else 0
    borders = range(first, 1000, size)
    return all(bisect_right(borders, a) == bisect_right(borders, b) for a, b in zip(query, key, strict=True))


def on_stride(query: Place, key: Place, size: int, layer: int) -> bool:
    x_left, y_left = [(x, y) for y in range(size) for x in range(size)][layer % size**2]
    steps = range(-1000 * size, 1000 * size, size)
    return query[1] - key[1] - x_left in steps and query[0] - key[0] - y_left in steps


SEEN: dict[str, Callable[[Place, Place, int, int], bool]] = {
    "circle": in_circle,
    "neighbourhood": in_square,
    "swin": in_window,
    "strided": on_stride,
}


def softmax_of(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """One query [D] over keys and values, each [D]."""
    weights = torch.stack([(query @ key / sqrt(len(query))).exp() for key in keys])
    return sum(weight * value for weight, value in zip(weights, values, strict=True)) / weights.sum()


def squares(height: int, width: int, size: int) -> Iterator[list[Place]]:
    """Places of each square of `size`, those at the border cut off by it."""
    for top, left in product(range(0, height, size), range(0, width, size)):
        inside = product(range(top, top + size), range(left, left + size))
        yield [(y, x) for y, x in inside if y < height and x < width]


def sampled(name: str, query: Tensor, key: Tensor, value: Tensor, text: int, grid: Place, size: int, layer: int):
    """Attention of one head, [L, D]: softmax over the keys that SEEN shows."""
    where = places(*grid)
    outputs = []
    for index in range(len(query)):
        seen = [
            other
            for other in range(len(key))
            if index < text or other < text or SEEN[name](where[index - text], where[other - text], size, layer)
        ]
        outputs.append(softmax_of(query[index], [key[i] for i in seen], [value[i] for i in seen]))
    return torch.stack(outputs)


def convolved(image: Tensor, grid: Place, size: int, kernel: Tensor) -> list[Tensor]:
    """A kernel [D, 1, size, size] over image tokens [I, D], in squares."""
    tokens = []
    for square in squares(*grid, size):
        top, left = square[0]
        tokens.append(sum(kernel[:, 0, y - top, x - left] * image[y * grid[1] + x] for y, x in square))
    return tokens


def compressed(
    name: str, query: Tensor, key: Tensor, value: Tensor, text: int, grid: Place, size: int, learned: dict[str, Tensor]
) -> Tensor:
    """Attention of one head, [L, D]: text over everything, image over text and what stands for the image."""
    keys, values = list(key[text:]), list(value[text:])
    if name == "convolved":
        few_keys = convolved(key[text:], grid, size, learned["key_kernel"])
        few_values = convolved(value[text:], grid, size, learned["value_kernel"])
    elif name == "agent":
        few_keys = [
            torch.stack([query[text + y * grid[1] + x] for y, x in square]).mean(0) for square in squares(*grid, size)
        ]
        few_values = [softmax_of(agent, keys, values) for agent in few_keys]
    else:
        few_keys = [softmax_of(slot, keys, keys) for slot in learned["slots"]]
        few_values = [softmax_of(slot, keys, values) for slot in learned["slots"]]
    seen_keys, seen_values = [*key[:text], *few_keys], [*value[:text], *few_values]
    of_text = [softmax_of(token, list(key), list(value)) for token in query[:text]]
    return torch.stack([*of_text, *(softmax_of(token, seen_keys, seen_values) for token in query[text:])])


def feature(token: Tensor) -> Tensor:
    return torch.stack([x + 1 if x > 0 else x.exp() for x in token])


def linear(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    outputs = []
    for token in query:
        similar = torch.stack([feature(token) @ feature(other) for other in key])
        outputs.append((similar / similar.sum()) @ value)
    return torch.stack(outputs)


def sigmoid(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query @ key.T / sqrt(query.shape[1])
    return (1 / (1 + len(key) * (-scores).exp())) @ value


def attend(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    text: int,
    grid: Place,
    size: int,
    layer: int = 0,
    learned: dict[str, Tensor],
) -> Tensor:
    """Attention of all heads, [B, N, L, D], one head of one picture after the other."""
    out = []
    for batch, head in product(*map(range, query.shape[:2])):
        own = query[batch, head], key[batch, head], value[batch, head]
        parts = {
            kind: weights[head] if kind == "slots" else weights.chunk(query.shape[1])[head]
            for kind, weights in learned.items()
        }
        if name in SEEN:
            out.append(sampled(name, *own, text, grid, size, layer))
        elif name in ("linear", "sigmoid"):
            out.append({"linear": linear, "sigmoid": sigmoid}[name](*own))
        else:
            out.append(compressed(name, *own, text, grid, size, parts))
    return torch.stack(out).unflatten(0, query.shape[:2])
