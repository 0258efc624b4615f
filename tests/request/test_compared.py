"""Sets of pictures that are compared, and what is refused of them before anything is loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from clear_dist.launch import env
from clear_dist.options import Refusal
from clear_dist.request.compared import Sample, common_size, find_samples
from clear_dist.request.evaluate import EvaluateFlags
from clear_dist.stages import Size


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def folder(name: str, sizes: dict[str, Size]) -> Path:
    Path(name).mkdir(exist_ok=True)
    for file, size in sizes.items():
        Image.new("RGB", size).save(Path(name, file))
    return Path(name)


def found(**given: Any) -> tuple[Sample, ...]:
    return find_samples(EvaluateFlags(pictures=Path("a"), **given), env.read())


def test_pairs_are_found_by_name() -> None:
    folder("a", {"two.png": (8, 4), "one.jpg": (6, 4), "one.preview.png": (1, 1), ".hidden.png": (1, 1)})
    folder("b", {"one.webp": (6, 4), "two.png": (8, 4)})
    Path("a/one.txt").write_text("a hill\nat night\n")
    Path("a/two.txt").write_text("a lake")
    one, two = found(against=Path("b"), conditions=Path("b"))
    assert (one.name, one.size, one.other, one.caption) == ("one", (4, 6), Path("b/one.webp"), "a hill at night")
    assert (two.picture, two.condition, two.caption) == (Path("a/two.png"), Path("b/two.png"), "a lake")
    Path("lines").write_text("first\nsecond\n")
    assert [each.caption for each in found(prompts=Path("lines"))] == ["first", "second"]
    assert common_size((one, two)) is None and common_size((one,)) == (4, 6)


def test_size_is_that_of_the_upright_picture() -> None:
    folder("a", {})
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save("a/one.jpg", exif=exif)
    assert found()[0].size == (8, 4)


def longer() -> None:
    folder("b", {"one.png": (8, 8), "two.png": (8, 8), "zoo.png": (8, 8)})


def larger() -> None:
    folder("b", {"one.png": (8, 8), "two.png": (8, 16)})


def renamed() -> None:
    folder("b", {"one.png": (8, 8), "three.png": (8, 8)})


def damaged() -> None:
    folder("b", {"one.png": (8, 8)})
    Path("b/two.png").write_bytes(b"no picture")


def twins() -> None:
    folder("b", {"one.png": (8, 8), "one.jpg": (8, 8)})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (longer, r"must hold as many pictures as a, 2, got 3 in b; the first without its like is b/zoo\.png"),
        (larger, r"one size, got 8 x 8 px in a/two\.png and 8 x 16 in b/two\.png"),
        (renamed, r"of the same names as a; the first without its like is b/three\.png"),
        (damaged, r"must be one that Pillow reads .* got b/two\.png"),
        (twins, r"must have each name once, got one\.jpg and one\.png"),
        (lambda: None, r"--against must be a folder of pictures, got b, which is none"),
        (lambda: folder("b", {}), r"--against must hold pictures .* got b without any"),
    ],
)
def test_sets_that_do_not_match_are_refused(make: Callable[[], object], words: str) -> None:
    folder("a", {"one.png": (8, 8), "two.png": (8, 8)})
    make()
    with pytest.raises(Refusal, match=words) as error:
        found(against=Path("b"))
    assert "\n" not in str(error.value)


def test_captions_that_are_lacking_are_refused() -> None:
    folder("a", {"one.png": (8, 8), "two.png": (8, 8)})
    Path("a/one.txt").write_text("a hill")
    with pytest.raises(Refusal, match=r"got 1 for 2, none for a/two\.png; nearest: a/two\.txt"):
        found()
    Path("a/two.txt").write_text(" \n")
    with pytest.raises(Refusal, match=r"must say something, got a/two\.txt"):
        found()
    Path("lines").write_text("only one\n")
    with pytest.raises(Refusal, match=r"a line for each of 2 pictures, got 1 in lines"):
        found(prompts=Path("lines"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"window": 0}, "--window must be a radius of at least 1 or full, got 0; nearest: 1"),
        ({"window": "wide"}, "got wide; nearest: 1"),
        ({"res": 64}, "got no --window; nearest: --window full"),
        ({"window": 8, "res": 1000}, "a multiple of 16 pixels to count attention, got 1000; nearest: 1008"),
        ({"window": 8, "res": (64, 48), "down_factor": 4}, "a multiple of 64 pixels .* got 48; nearest: 64"),
        ({"condition": "gray"}, "--condition needs --conditions FOLDER, got gray alone"),
        ({"condition": "grey"}, "--condition must be one of same, gray, got 'grey'; nearest: gray"),
        ({"batch": 0}, "--batch must be from 1 to 1024, got 0; nearest: 1"),
    ],
)
def test_flags_that_contradict_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(Refusal, match=words):
        EvaluateFlags(pictures=Path("a"), **given)
