"""Language of the demo model: seven attributes of a landscape, written as one short caption.

    {dawn|noon|sunset|night} over {green|autumn|snowy|desert} {mountains|hills|dunes|sea},
    {sun|moon} {on the left|in the center|on the right}, {clear|cloudy} sky[, pine trees]

Every attribute may be left out. No torch here: the command line parses prompts before anything heavy is loaded.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

CHOICES: dict[str, tuple[str, ...]] = {
    "time": ("dawn", "noon", "sunset", "night"),
    "season": ("green", "autumn", "snowy", "desert"),
    "land": ("mountains", "hills", "dunes", "sea"),
    "body": ("sun", "moon"),
    "side": ("left", "center", "right"),
    "sky": ("clear", "cloudy"),
    "trees": ("pine",),
}
SYNONYMS: dict[str, str] = {
    "sunrise": "dawn", "daybreak": "dawn", "morning": "dawn",
    "midday": "noon", "day": "noon", "daytime": "noon", "daylight": "noon", "afternoon": "noon",
    "evening": "sunset", "dusk": "sunset", "sundown": "sunset", "twilight": "sunset",
    "midnight": "night", "nighttime": "night", "dark": "night",
    "summer": "green", "spring": "green", "grassy": "green", "meadow": "green", "lush": "green",
    "fall": "autumn", "autumnal": "autumn", "golden": "autumn",
    "winter": "snowy", "snow": "snowy", "wintry": "snowy", "icy": "snowy", "white": "snowy",
    "arid": "desert", "sandy": "desert", "sand": "desert", "dry": "desert",
    "mountain": "mountains", "peaks": "mountains", "alps": "mountains", "ridge": "mountains",
    "hill": "hills", "valley": "hills", "dune": "dunes",
    "ocean": "sea", "water": "sea", "lake": "sea", "seaside": "sea", "coast": "sea",
    "moonlight": "moon", "crescent": "moon", "sunshine": "sun", "sunlight": "sun",
    "centre": "center", "middle": "center", "centered": "center",
    "clouds": "cloudy", "cloud": "cloudy", "overcast": "cloudy", "cloudless": "clear", "sunny": "clear",
    "pines": "pine", "tree": "pine", "trees": "pine", "forest": "pine", "firs": "pine", "spruce": "pine",
}  # fmt: skip
FILLERS = frozenset({
    "a", "an", "and", "at", "above", "in", "of", "on", "over", "the", "to", "with", "under", "by", "near", "sky",
    "land", "side", "is", "it", "its", "picture", "image", "painting", "photo", "landscape", "view", "scene",
    "behind", "some",
})  # fmt: skip
WORD_TO_ATTRIBUTE = {word: name for name, words in CHOICES.items() for word in words}
SIDE_PHRASES = {"left": "on the left", "center": "in the center", "right": "on the right"}
DEFAULT_PROMPT = "sunset over green mountains, sun on the left, clear sky, pine trees"
DROP_ATTRIBUTE, DROP_ALL, SHUFFLE = 0.15, 0.10, 0.20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Landscape:
    """Attributes named by a caption, None where it names none. `trees` is "pine" or None."""

    time: str | None = None
    season: str | None = None
    land: str | None = None
    body: str | None = None
    side: str | None = None
    sky: str | None = None
    trees: str | None = None


def phrases(landscape: Landscape) -> list[str]:
    place = " ".join(word for word in (landscape.season, landscape.land) if word)
    if landscape.season and not landscape.land:
        place = f"{landscape.season} land"
    first = " over ".join(part for part in (landscape.time, place) if part)
    side = SIDE_PHRASES[landscape.side] if landscape.side else None
    second = " ".join(part for part in (landscape.body, side) if part)
    third = f"{landscape.sky} sky" if landscape.sky else ""
    fourth = "pine trees" if landscape.trees else ""
    return [phrase for phrase in (first, second, third, fourth) if phrase]


def caption(landscape: Landscape) -> str:
    return ", ".join(phrases(landscape))


def parse(prompt: str) -> tuple[str, list[str]]:
    """(canonical caption, words without meaning) of a prompt; of two mentions of an attribute the first counts."""
    landscape, unknown = parsed(prompt)
    return caption(landscape), unknown


def parsed(prompt: str) -> tuple[Landscape, list[str]]:
    """Attributes that a prompt names, and words without meaning, as `parse`."""
    found: dict[str, str] = {}
    unknown: list[str] = []
    for word in re.findall(r"[^\W\d_]+|\d+", prompt.lower()):
        known = _known_word(word)
        if known is None or (known and found.setdefault(WORD_TO_ATTRIBUTE[known], known) != known):
            unknown.append(word)
    return Landscape(**found), unknown


def _known_word(word: str) -> str | None:
    """Grammar's word for a user's word; "" for a filler, None for a word without meaning here."""
    if word in FILLERS:
        return ""
    if word in WORD_TO_ATTRIBUTE:
        return word
    if word in SYNONYMS:
        return SYNONYMS[word]
    # short words have too many neighbours ("red" is not "desert", "car" not "clear")
    vocabulary = [candidate for candidate in (*WORD_TO_ATTRIBUTE, *SYNONYMS) if len(candidate) > 3]
    close = difflib.get_close_matches(word, vocabulary, n=1, cutoff=0.8) if len(word) > 3 else []
    return SYNONYMS.get(close[0], close[0]) if close else None


def random_landscape(rng: np.random.Generator) -> Landscape:
    """A complete landscape. Suns at night and moons at noon are rare, but they exist."""
    words = {name: str(rng.choice(CHOICES[name])) for name in ("time", "season", "land", "side", "sky")}
    usual, other = ("moon", "sun") if words["time"] == "night" else ("sun", "moon")
    body = usual if rng.random() < 0.82 else other
    return Landscape(**words, body=body, trees="pine" if rng.random() < 0.5 else None)


def training_caption(landscape: Landscape, rng: np.random.Generator) -> str:
    """A caption as training sees it: some attributes dropped, some phrases shuffled, some captions empty."""
    if rng.random() < DROP_ALL:
        return ""
    words = dataclasses.asdict(landscape)
    kept = {name: word for name, word in words.items() if rng.random() >= DROP_ATTRIBUTE}
    parts = phrases(Landscape(**kept))
    if rng.random() < SHUFFLE:
        rng.shuffle(parts)
    return ", ".join(parts)


def random_caption(rng: np.random.Generator) -> str:
    return caption(random_landscape(rng))
