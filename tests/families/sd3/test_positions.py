"""Positions: diffusers' own crop of the whole grid, and above the table the formula, computed apart in numpy."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from clear_dist.families.sd3.positions import positions
from clear_dist.geometry import Rows
from tests.families.sd3.tiny import HEAD_DIM, HEADS, TABLE, make_tiny_transformer

NATIVE = 8
"""Side in tokens of the model's native size."""


def cut_of(height: int, width: int, own: Rows, position_scale: float | None = None, *, by_columns: bool = False) -> Any:
    extrapolation = None if position_scale is None else SimpleNamespace(position_scale=position_scale)
    plan = SimpleNamespace(own=own)
    return SimpleNamespace(size=(height, width), by_columns=by_columns, plan=plan, extrapolation=extrapolation)


def formula(height: int, width: int, scale: float) -> np.ndarray:
    """[height x width, C]: sines and cosines of each token's column, then of its row."""
    channels = HEADS * HEAD_DIM
    rates = np.array([10_000.0 ** (-j / (channels // 4)) for j in range(channels // 4)])
    found = np.empty((height, width, channels))
    for row in range(height):
        for column in range(width):
            encoded = []
            for index, length in ((column, width), (row, height)):
                in_table = (TABLE - 1) / 2 + scale * (index - (length - 1) / 2)
                angles = rates * (in_table * NATIVE / TABLE)
                encoded += [np.sin(angles), np.cos(angles)]
            found[row, column] = np.concatenate(encoded)
    return found.reshape(-1, channels)


@pytest.mark.parametrize(("height", "width"), [(5, 8), (8, 5), (24, 7), (1, 24)])
def test_up_to_the_table_they_are_diffusers_crop(height: int, width: int) -> None:
    patches = make_tiny_transformer().pos_embed
    whole = patches.cropped_pos_embed(2 * height, 2 * width)[0]
    cut = height // 2
    for own in (Rows(0, cut), Rows(cut, height)):
        expected = whole[own.start * width : own.stop * width]
        assert torch.equal(positions(patches, cut_of(height, width, own)), expected)
    own = Rows(width // 3, width)
    expected = torch.cat([whole[column::width] for column in range(own.start, own.stop)])
    assert torch.equal(positions(patches, cut_of(height, width, own, by_columns=True)), expected)


@pytest.mark.parametrize(("height", "width"), [(25, 3), (3, 25), (30, 48), (47, 24)])
def test_above_the_table_they_are_the_formula(height: int, width: int) -> None:
    patches, own = make_tiny_transformer().pos_embed, Rows(1, 3)
    found = positions(patches, cut_of(height, width, own))
    whole = formula(height, width, TABLE / max(height, width))
    assert np.abs(found.numpy() - whole[own.start * width : own.stop * width]).max() < 1e-6
    found = positions(patches, cut_of(height, width, own, by_columns=True))
    expected = np.concatenate([whole[column::width] for column in range(own.start, own.stop)])
    assert np.abs(found.numpy() - expected).max() < 1e-6


def test_at_whole_rows_the_formula_is_the_table() -> None:
    table = make_tiny_transformer().pos_embed.pos_embed[0]
    assert np.abs(table.numpy() - formula(TABLE, TABLE, 1.0)).max() < 1e-6


def test_positions_above_the_native_size_are_interpolated_where_asked() -> None:
    patches, own = make_tiny_transformer().pos_embed, Rows(4, 9)
    found = positions(patches, cut_of(16, 12, own, position_scale=0.5))
    assert np.abs(found.numpy() - formula(16, 12, 0.5)[own.start * 12 : own.stop * 12]).max() < 1e-6
    stock = positions(patches, cut_of(16, 12, own, position_scale=1.0))
    assert torch.equal(stock, positions(patches, cut_of(16, 12, own)))
