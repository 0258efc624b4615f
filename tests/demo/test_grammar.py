"""The demo's grammar: free prompts become canonical captions, words without meaning are named."""

import numpy as np
import pytest

from clear_dist.demo.grammar import (
    CHOICES,
    DEFAULT_PROMPT,
    caption,
    parse,
    random_caption,
    random_landscape,
    training_caption,
)


@pytest.mark.parametrize(
    ("prompt", "canonical", "unknown"),
    [
        ("", "", []),
        (DEFAULT_PROMPT, DEFAULT_PROMPT, []),
        ("snowy hills", "snowy hills", []),
        ("pine trees, cloudy sky, moon on the right, night over desert dunes",
         "night over desert dunes, moon on the right, cloudy sky, pine trees", []),
        ("Winter sunrise above the ocean", "dawn over snowy sea", []),
        ("midday; a HILL with a forest", "noon over hills, pine trees", []),
        ("mountans at nigth", "night over mountains", []),
        ("sun in the centre", "sun in the center", []),
        ("autumn", "autumn land", []),
        ("on the left", "on the left", []),
        ("a red car below the moon", "moon", ["red", "car", "below"]),
        ("sunset or noon", "sunset", ["or", "noon"]),
    ],
)  # fmt: skip
def test_parse(prompt, canonical, unknown):
    assert parse(prompt) == (canonical, unknown)


def test_every_complete_caption_parses_to_itself():
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = random_caption(rng)
        assert parse(text) == (text, [])


def test_training_captions_hold_only_what_the_picture_shows():
    rng = np.random.default_rng(1)
    lengths = []
    for _ in range(300):
        landscape = random_landscape(rng)
        text = training_caption(landscape, rng)
        canonical, unknown = parse(text)
        assert unknown == []
        assert set(canonical.replace(",", "").split()) <= {*caption(landscape).replace(",", "").split(), "land"}
        lengths.append(len(text))
    assert 0.04 < lengths.count(0) / 300 < 0.2  # empty captions, for classifier-free guidance


def test_random_landscapes_use_every_word():
    rng = np.random.default_rng(2)
    captions = " ".join(random_caption(rng) for _ in range(200))
    assert all(word in captions for words in CHOICES.values() for word in words)
