import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clear_dist.pictures import save_picture
from clear_dist.pictures.thumbnail import Thumbnail, in_blocks
from tests.pictures.rows import noise, split


@pytest.mark.parametrize(("height", "width"), [(50, 8000), (5000, 20), (130, 9000), (8192, 16), (33, 4097)])
def test_thumbnails_are_averages(height: int, width: int) -> None:
    picture, thumbnail = noise(height, width), Thumbnail(height, width)
    passed = list(thumbnail.watching(in_blocks(split(picture), height, width)))
    np.testing.assert_array_equal(np.concatenate(passed), picture)
    found, expected = np.asarray(thumbnail.image), Image.fromarray(picture).reduce(thumbnail.factor)
    np.testing.assert_array_equal(found, np.asarray(expected))
    factor = thumbnail.factor
    for y, x in ((0, 0), (len(found) - 1, found.shape[1] - 1)):
        pixels = picture[y * factor : (y + 1) * factor, x * factor : (x + 1) * factor]
        assert np.abs(pixels.mean((0, 1)) - found[y, x]).max() <= 0.51


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (8192, 8192, (1024, 1024)),
        (4097, 16, (2, 513)),
        (8193, 5000, (313, 513)),
        (16384, 16384, (1024, 1024)),
        (1, 32768, (2048, 1)),
    ],
)
def test_the_longest_side_has_1024_pixels_if_a_factor_up_to_16_allows(
    height: int, width: int, size: tuple[int, int]
) -> None:
    assert Thumbnail(height, width).image.size == size


@pytest.mark.parametrize("ending", [".png", ".tiff", ".jpg"])
def test_a_large_picture_has_one_beside_it(tmp_path: Path, ending: str) -> None:
    files = save_picture(
        [np.full((20, 5000, 3), 200, np.uint8)],
        tmp_path / f"a{ending}",
        height=20,
        width=5000,
        metadata={"prompt": "p"},
    )
    assert files == [tmp_path / f"a{ending}", tmp_path / "a.thumbnail.jpg"]
    assert sorted(os.listdir(tmp_path)) == sorted(file.name for file in files)
    with Image.open(files[1]) as thumbnail:
        assert thumbnail.size == (625, 3)
        assert np.abs(np.asarray(thumbnail).astype(int) - 200).max() <= 2
        assert not thumbnail.getexif()
