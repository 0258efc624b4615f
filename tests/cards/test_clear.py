from clear_dist.cards import clear
from clear_dist.families.cards import CARDS

PUBLISHED = {
    "clear_local_8.safetensors": (8, 1),
    "clear_local_16.safetensors": (16, 1),
    "clear_local_32.safetensors": (32, 1),
    "clear_local_8_down_4.safetensors": (8, 4),
    "clear_local_16_down_4.safetensors": (16, 4),
}
"""The table of the official README."""


def test_the_published_names_are_those_of_the_readme() -> None:
    found = {name: (clear.radius_of(name), clear.named_down_factor(name)) for name in PUBLISHED}
    assert clear.radius_of("clear_local_0.safetensors") is None
    assert found == PUBLISHED and set(CARDS.published[0].files) == set(PUBLISHED)
