"""The alternatives against loops over queries and keys, their gradients, their operations, the grids they refuse."""

from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import pytest
import torch

from clear_dist.options import Refusal
from clear_dist.request.distill import PATTERN_SIZES, Recipe
from clear_dist.training.attention import Layout
from clear_dist.training.patterns import PATTERNS, pattern_of
from tests.training.patterns import oracles

HEADS, HEAD_DIM, TEXT = 2, 4, 3
SETTINGS = {
    "circle": {"radius": 3},
    "neighbourhood": {"radius": 3},
    "swin": {"side": 4},
    "strided": {"stride": 2},
    "convolved": {"factor": 2},
    "agent": {"factor": 2},
    "slots": {"slots": 5},
    "linear": {},
    "sigmoid": {},
}
CASES = [
    ("neighbourhood", (5, 7), 0, True),
    ("swin", (5, 7), 0, True),
    ("swin", (6, 9), 1, False),
    ("strided", (5, 6), 1, True),
    ("strided", (5, 6), 6, False),
    ("convolved", (4, 6), 0, False),
    ("agent", (5, 7), 0, True),
    ("agent", (4, 6), 0, False),
    ("slots", (5, 4), 2, False),
    ("linear", (5, 4), 0, True),
    ("sigmoid", (5, 4), 0, False),
]


def layout_of(grid: tuple[int, int], layer: int = 0, text_first: bool = True) -> Layout:
    return Layout(layer=layer, height=grid[0], width=grid[1], text_first=text_first)


@pytest.mark.parametrize(("name", "grid", "layer", "text_first"), CASES)
def test_outputs_and_gradients_are_those_of_loops(
    name: str, grid: tuple[int, int], layer: int, text_first: bool
) -> None:
    pattern, layout = PATTERNS[name](**SETTINGS[name]), layout_of(grid, layer, text_first)
    learned = {
        key: (start + 0.3 * torch.randn(start.shape)).requires_grad_()
        for key, start in pattern.parameters(layout, HEADS, HEAD_DIM).items()
    }
    inputs = [torch.randn(2, HEADS, TEXT + layout.image, HEAD_DIM, requires_grad=True) for _ in range(3)]
    weights = torch.randn(inputs[0].shape)
    out = pattern(*inputs, layout, learned)
    gradients = torch.autograd.grad((out * weights).sum(), [*inputs, *learned.values()])

    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    learned_doubles = {key: tensor.detach().double().requires_grad_() for key, tensor in learned.items()}
    turn = 0 if text_first else TEXT  # the loops have the text in front
    wanted = oracles.attend(
        name,
        *(tensor.roll(turn, dims=2) for tensor in doubles),
        text=TEXT,
        grid=grid,
        size=next(iter(SETTINGS[name].values()), 0),
        layer=layer,
        learned=learned_doubles,
    ).roll(-turn, dims=2)
    wanted_gradients = torch.autograd.grad((wanted * weights).sum(), [*doubles, *learned_doubles.values()])
    torch.testing.assert_close(out.double(), wanted, atol=1e-5, rtol=1e-5)
    for gradient, expected in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", PATTERNS)
def test_text_may_be_missing_and_numbers_short(name: str) -> None:
    pattern, layout = PATTERNS[name](**SETTINGS[name]), layout_of((4, 4))
    query, key, value = torch.randn(3, 1, HEADS, layout.image, HEAD_DIM).bfloat16()
    learned = pattern.parameters(layout, HEADS, HEAD_DIM)
    out = pattern(query, key, value, layout, {name: start.bfloat16() for name, start in learned.items()})
    assert out.dtype == torch.bfloat16 and out.shape == query.shape
    exact = pattern(query.float(), key.float(), value.float(), layout, learned)
    torch.testing.assert_close(out.float(), exact, atol=0.05, rtol=0.05)


def test_a_recipe_names_every_pattern_and_its_size(tmp_path: Path) -> None:
    assert list(PATTERN_SIZES) == list(PATTERNS)
    assert all(pattern_of(name, 3) for name in PATTERNS)
    assert pattern_of("circle", 3, 2) == PATTERNS["circle"](radius=3, down_factor=2)
    names = [Recipe(data=tmp_path, pattern=name, window=4).checkpoint_name for name in ("circle", "swin", "linear")]
    assert names == ["clear_local_4.safetensors", "clear_swin_4.safetensors", "clear_linear.safetensors"]
    with pytest.raises(Refusal, match="--down-factor must be 1 for --pattern swin, got 2; nearest: --pattern circle"):
        Recipe(data=tmp_path, pattern="swin", window=4, down_factor=2)


def test_convolved_keys_begin_as_means() -> None:
    layout, pattern = layout_of((4, 8)), PATTERNS["convolved"](factor=4)
    key = torch.randn(1, HEADS, 32, HEAD_DIM)
    few, _ = pattern.compress(key, key, key, layout, pattern.parameters(layout, HEADS, HEAD_DIM))
    torch.testing.assert_close(few, key.unflatten(2, (4, 2, 4)).mean(dim=(2, 4)))


@pytest.mark.parametrize(
    ("name", "size", "layer", "heads", "printed"),
    [
        ("sigmoid", 0, 0, 24, "260.9"),
        ("linear", 0, 0, 1, "174.0"),
        ("linear", 0, 0, 24, "7.3"),
        ("convolved", 4, 0, 24, "67.7"),
        ("agent", 4, 0, 24, "80.5"),
        ("strided", 4, 0, 24, "67.7"),
        ("strided", 4, 55, 24, "67.7"),
        ("swin", 16, 0, 24, "67.7"),
        ("circle", 8, 0, 24, "63.5"),
        ("circle", 32, 0, 24, "154.1"),
    ],
)
def test_operations_are_those_of_table_2(name: str, size: int, layer: int, heads: int, printed: str) -> None:
    """Printed figures were rounded twice: 67.646 is 67.65 is 67.7, and 173.946 is 173.95 is 174.0."""
    operations = pattern_of(name, size).operations(layout_of((64, 64), layer), 512, heads, 3072 // heads)
    rounded = Decimal(operations) / 10**9
    for digits in ("0.01", "0.1"):
        rounded = rounded.quantize(Decimal(digits), ROUND_HALF_UP)
    assert str(rounded) == printed


@pytest.mark.parametrize("name", [*oracles.SEEN, "agent", "convolved", "slots"])
@pytest.mark.parametrize("layer", [0, 3])
def test_operations_are_pairs_of_queries_and_keys(name: str, layer: int) -> None:
    size, grid = next(iter(SETTINGS[name].values())), (6, 8)
    where = oracles.places(*grid)
    if name in oracles.SEEN:
        seen = sum(oracles.SEEN[name](query, key, size, layer) for query in where for key in where)
        pairs = TEXT * (TEXT + len(where)) + TEXT * len(where) + seen
    else:
        few = size if name == "slots" else len(list(oracles.squares(*grid, size)))
        gathering = {"agent": 1.0, "slots": 1.5, "convolved": 0.0}[name]
        pairs = TEXT * (TEXT + len(where)) + len(where) * (TEXT + few) + gathering * few * len(where)
    counted = PATTERNS[name](**SETTINGS[name]).operations(layout_of(grid, layer), TEXT, HEADS, HEAD_DIM)
    assert counted == 4 * HEADS * HEAD_DIM * pairs


def test_grids_that_convolutions_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"multiples of the 4 tokens .* got 30 x 64; nearest: 32 x 64"):
        PATTERNS["convolved"](factor=4).parameters(layout_of((30, 64)), HEADS, HEAD_DIM)


def test_slots_begin_apart_and_the_same_everywhere() -> None:
    slots, again = (PATTERNS["slots"](slots=8).parameters(layout_of((4, 4)), HEADS, HEAD_DIM)["slots"] for _ in "ab")
    assert torch.equal(slots, again)
    assert len(slots.flatten(0, 1).unique(dim=0)) == HEADS * 8
