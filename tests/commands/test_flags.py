"""The command line that is made from records: numbers that are none."""

from dataclasses import fields

import pytest

from clear_dist.commands.flags import no_number
from clear_dist.options import flag_of
from clear_dist.request.flags import GenerateFlags

FLAGS = {each.name: flag_of(each) for each in fields(GenerateFlags)}


@pytest.mark.parametrize(
    ("name", "text", "nearest"),
    [
        ("seed", "1e30", str(2**63 - 1)),
        ("res", "512.4", "512"),
        ("res", "many", "16"),
        ("res", "nan", "16"),
        ("guidance_scale", "1e9", "100"),
    ],
)
def test_words_in_place_of_numbers(name: str, text: str, nearest: str) -> None:
    assert str(no_number(name, FLAGS[name], text)).endswith(f"got {text!r}; nearest: {nearest}")


def test_bounds_are_told_to_the_last_digit() -> None:
    assert "from 0 to 9223372036854775807, got" in str(no_number("seed", FLAGS["seed"], "x"))
