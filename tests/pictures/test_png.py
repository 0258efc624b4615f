import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clear_dist.pictures import png, save_picture
from tests.pictures.rows import noise, split

SIZES = [(1, 1), (1, 2), (1, 333), (257, 1), (2, 2), (15, 17), (16, 16), (17, 15), (48, 64), (100, 1000), (333, 77)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pillow_reads_the_same_pixels(tmp_path: Path, height: int, width: int, seed: int) -> None:
    picture, file = noise(height, width, seed), tmp_path / "a.png"
    save_picture(split(picture, seed), file, height=height, width=width, metadata=None)
    with Image.open(file) as found:
        assert found.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(found), picture)


def test_every_neighbourhood_of_a_few_values_is_filtered_right(tmp_path: Path) -> None:
    """All a, b, c of values that are near, far and at the ends of a byte: ties, and c between or beside a and b."""
    values = np.array([0, 1, 2, 3, 126, 127, 128, 129, 253, 254, 255], np.uint8)
    c, b, a = (part.ravel() for part in np.meshgrid(values, values, values))
    grey = np.stack([np.stack([c, b], 1).ravel(), np.stack([a, a], 1).ravel()])
    picture, file = np.repeat(grey[..., None], 3, axis=2), tmp_path / "a.png"
    save_picture([picture], file, height=2, width=len(c) * 2, metadata=None)
    with Image.open(file) as found:
        np.testing.assert_array_equal(np.asarray(found), picture)
    lines = picture.reshape(2, -1)
    filtered = png._filtered(lines, np.zeros_like(lines[0]), 3)
    assert (filtered[:, 0] == png.PAETH).all()
    expected = [
        int(lines[1, i]) - paeth(*(int(v) for v in (lines[1, i - 3], lines[0, i], lines[0, i - 3])))
        for i in range(3, lines.shape[1])
    ]
    np.testing.assert_array_equal(filtered[1, 4:], np.array(expected).astype(np.uint8))


def paeth(a: int, b: int, c: int) -> int:
    """The specification's predictor."""
    p = a + b - c
    if abs(p - a) <= abs(p - b) and abs(p - a) <= abs(p - c):
        return a
    return b if abs(p - b) <= abs(p - c) else c


def test_chunks_are_no_larger_than_blocks(tmp_path: Path) -> None:
    file, picture = tmp_path / "a.png", np.random.default_rng(0).integers(0, 256, (640, 500, 3), np.uint8)
    save_picture([picture], file, height=640, width=500, metadata={"prompt": "ß"})
    content, at, kinds = file.read_bytes(), 8, []
    while at < len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        kinds.append(kind)
        if kind == b"IDAT":
            assert length <= 16 * 500 * 3 + 2**16
        at += 12 + length
    assert at == os.path.getsize(file)
    assert kinds[:3] == [b"IHDR", b"sRGB", b"iTXt"] and kinds[-1] == b"IEND" and set(kinds[3:-1]) == {b"IDAT"}
    assert kinds.count(b"IDAT") > 5


def test_smooth_pictures_become_small(tmp_path: Path) -> None:
    file, ramp = tmp_path / "a.png", np.add.outer(np.arange(256), np.arange(1024) // 4).astype(np.uint8)
    save_picture([np.repeat(ramp[..., None], 3, axis=2)], file, height=256, width=1024, metadata=None)
    assert file.stat().st_size < 1024 * 256 * 3 / 8
