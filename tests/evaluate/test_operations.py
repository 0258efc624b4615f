"""Operations of attention are the paper's printed figures (Tables 2, 3, 7 and 8), and those of a mask that is written out."""

import pytest
import torch

from clear_dist.evaluate.operations import attended, counted
from clear_dist.options import Window

DEV, SD35 = {"channels": 3_072, "text_tokens": 512}, {"channels": 2_432, "text_tokens": 512}
WINDOWS: tuple[Window, ...] = ("full", 8, 16, 32)
TABLES_2_AND_3 = {
    64: (260.9, 63.5, 86.6, 154.1),  # r = 16 is printed as 80.6
    128: (3507.9, 246.2, 352.6, 724.3),
    256: (53604.4, 979.3, 1433.2, 3141.7),
}
TABLE_7 = {64: (0.26, 0.06, 0.09, 0.15), 512: (847.73, 3.92, 5.79, 13.09)}


@pytest.mark.parametrize("side", TABLES_2_AND_3)
def test_figures_of_tables_2_and_3(side: int) -> None:
    found = [counted((side, side), window, down_factor=1, **DEV).value for window in WINDOWS]
    assert found == pytest.approx(TABLES_2_AND_3[side], abs=0.0501)


@pytest.mark.parametrize("side", TABLE_7)
def test_figures_of_table_7_in_tflops(side: int) -> None:
    found = [counted((side, side), window, down_factor=1, **DEV).value or 0 for window in WINDOWS]
    assert [each / 1e3 for each in found] == pytest.approx(TABLE_7[side], abs=0.0051)  # 13.085 is printed as 13.09


def test_where_the_paper_prints_another_figure_it_is_said() -> None:
    dev, large = (counted((64, 64), 16, down_factor=1, **shape) for shape in (DEV, SD35))
    assert dev.note == "the paper prints 80.6 (Table 2)" and dev.value == pytest.approx(86.6, abs=0.05)
    assert large.note == "the paper prints 63.8 (Table 8)" and large.value == pytest.approx(68.6, abs=0.05)
    assert counted((64, 64), "full", down_factor=1, **SD35).value == pytest.approx(206.5, abs=0.101)  # printed, cut off
    others = [counted((64, 64), 16, down_factor=factor, **DEV) for factor in (2, 4)]
    assert {each.note for each in (*others, counted((64, 64), 8, down_factor=1, **DEV))} == {""}


@pytest.mark.parametrize(("radius", "down_factor"), [(1, 1), (3, 1), (5, 2), (40, 4)])
def test_pairs_are_those_of_a_mask(radius: int, down_factor: int) -> None:
    height, width, text = 12, 20, 7
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    down, across = (x.reshape(-1, 1) - x.reshape(1, -1) for x in (rows, columns))
    mask = torch.ones(text + height * width, text + height * width, dtype=torch.bool)
    mask[text:, text:] = down.square() + across.square() < radius**2
    pooled = height * width * (height // down_factor) * (width // down_factor) if down_factor > 1 else 0
    found = attended((height, width), radius, down_factor=down_factor, text_tokens=text)
    assert found == int(mask.sum()) + pooled
