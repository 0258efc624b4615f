"""Detail above a lower size's Nyquist, kept pictures, the table in a page, and the busiest square."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.fidelity import embedded, refined
from clear_dist.demo import DEFAULT_STRENGTH


def wave(period: float, *, side: int = 64, axis: int = 1, amplitude: float = 100) -> Image.Image:
    """Grey stripes along an axis, even around the borders."""
    line = np.cos(2 * np.pi * (np.arange(side) + 0.5) / period)
    grey = 128 + amplitude * np.broadcast_to(line if axis else line[:, None], (side, side))
    return Image.fromarray(np.repeat(grey.round().astype(np.uint8)[..., None], 3, axis=2))


@pytest.mark.parametrize("axis", [0, 1])
def test_detail_is_what_half_the_pixels_cannot_show(axis: int) -> None:
    assert refined.detail(wave(16, axis=axis), 32) < 0.5
    fine = refined.detail(wave(3.2, axis=axis), 32)
    assert fine == pytest.approx(100 / np.sqrt(2), rel=0.02)
    assert refined.detail(wave(16, axis=axis), 6) == pytest.approx(fine, rel=0.02), "finer than 6 pixels can show"
    assert refined.detail(wave(3.2, axis=axis, amplitude=50), 32) == pytest.approx(fine / 2, rel=0.02)


def test_a_ramp_has_no_detail_at_its_borders() -> None:
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))).convert("RGB")
    assert refined.detail(ramp, 32) < 1


def test_ways_have_what_the_command_line_gives_them() -> None:
    steps = {way.title: (way.upscaling.steps, way.upscaling.strength) for way in refined.WAYS}
    assert steps["SDEdit 0.3"] == (6, DEFAULT_STRENGTH)
    assert steps["SDEdit 0.7"] == (14, 0.7)
    assert steps["I-Max"] == (20, 1.0)
    assert steps["HiFlow"] == (11, 1.0)


def test_the_busiest_square_is_where_edges_are() -> None:
    grey = np.zeros((64, 64, 3), np.uint8)
    grey[40:48:2, 20:30] = 255
    assert refined.busiest(Image.fromarray(grey), 32) == (32, 64, 64, 96)


def test_a_picture_is_drawn_once_with_its_seconds(tmp_path: Path) -> None:
    drawn: list[int] = []

    def draw() -> Image.Image:
        drawn.append(len(drawn))
        return wave(5)

    first, again = (embedded.kept(tmp_path / "a" / "one.png", draw) for _ in range(2))
    assert drawn == [0] and first == again
    assert first.picture.tobytes() == wave(5).tobytes() and first.seconds > 0


def test_a_sheet_shows_every_pixel(tmp_path: Path) -> None:
    rows = [[("a", wave(16)), ("b", wave(8))], [("c", wave(4))]]
    embedded.sheet(rows, tmp_path / "sheet.jpg")
    with Image.open(tmp_path / "sheet.jpg") as read:
        shown = np.asarray(read).astype(float)
    assert shown.shape == (2 * (64 + 24), 2 * 68, 3)
    part = shown[embedded.LABEL : embedded.LABEL + 64, 68 : 68 + 64]
    assert np.abs(part - np.asarray(wave(8))).mean() < 8


def test_a_table_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- one -->\nold\n<!-- /one -->\nb\n<!-- two -->\n<!-- /two -->\n")
    embedded.put_in_page(page, "one", "new\n")
    embedded.put_in_page(page, "one", "newer\n")
    assert page.read_text() == "a\n<!-- one -->\nnewer\n<!-- /one -->\nb\n<!-- two -->\n<!-- /two -->\n"
    with pytest.raises(ValueError, match="<!-- three -->"):
        embedded.put_in_page(page, "three", "")
    embedded.put_in_page(None, "one", "")
