import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from clear_dist.pictures import save_picture, tiff
from clear_dist.pictures.thumbnail import in_blocks
from tests.pictures.rows import noise, split

SIZES = [(1, 1), (1, 3), (3, 1), (3, 3), (1, 333), (257, 1), (15, 17), (16, 16), (17, 15), (48, 64), (100, 1000)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pillow_and_tifffile_read_the_same_pixels(tmp_path: Path, height: int, width: int) -> None:
    picture, file = noise(height, width), tmp_path / "a.tiff"
    save_picture(split(picture), file, height=height, width=width, metadata=None)
    with Image.open(file) as found:
        assert found.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(found), picture)
    with tifffile.TiffFile(file) as written:
        assert not written.is_bigtiff
        assert written.pages[0].shape == (height, width, 3)
        np.testing.assert_array_equal(written.asarray().reshape(picture.shape), picture)


def test_a_large_one_is_a_bigtiff(tmp_path: Path) -> None:
    picture, file, metadata = noise(100, 60), tmp_path / "a.tif", {"prompt": "ß" * 70_000, "Software": "clear-dist 0"}
    tiff.write(in_blocks(split(picture), 100, 60), file, (100, 60, 3), metadata, most_classic_bytes=picture.size - 1)
    with tifffile.TiffFile(file) as written:
        assert written.is_bigtiff
        np.testing.assert_array_equal(written.asarray(), picture)
        page = written.pages.first
        assert json.loads(page.description) == metadata
        assert page.software == "clear-dist 0"
    with Image.open(file) as found:
        np.testing.assert_array_equal(np.asarray(found), picture)


def test_16384_pixels_are_classic_and_40000_are_not() -> None:
    assert 16384**2 * 3 < tiff.MOST_CLASSIC_BYTES < 40000**2 * 3
