"""The record of options: windows, what is chosen where nothing was, and the words that messages propose."""

import pytest

from clear_dist.attention import BACKENDS
from clear_dist.options import ATTENTION_BACKENDS, Options, Refusal, Window, nearest_word, read_window


@pytest.mark.parametrize(("word", "window", "radius"), [("full", "full", None), ("8", 8, 8), ("1", 1, 1)])
def test_windows(word: str, window: Window, radius: int | None) -> None:
    options = Options(window=read_window(word))  # type: ignore[arg-type]
    assert (options.window, options.radius) == (window, radius)


def test_nothing_is_required() -> None:
    assert Options().window is Options().radius is None


@pytest.mark.parametrize(("given", "window", "text_attention"), [(None, 16, "average"), ("full", "full", "exact")])
def test_what_is_left_open_is_settled(given: Window | None, window: Window, text_attention: str) -> None:
    settled = Options(window=given).settled(16)
    assert (settled.window, settled.text_attention, settled.warmup_steps) == (window, text_attention, 4)
    chosen = Options(window=4, text_attention="exact", warmup_steps=2)
    assert chosen.settled(16) == chosen


@pytest.mark.parametrize("name", ["schedule", "text_tokens", "attention_backend"])
def test_none_is_refused_where_nothing_is_left_open(name: str) -> None:
    with pytest.raises(Refusal, match=rf"^--{name.replace('_', '-')} must be one of .*, got 'None'; nearest: "):
        Options(**{name: None})


@pytest.mark.parametrize(("warmup_steps", "steps", "lags"), [(0, 1, False), (0, 2, True), (4, 4, False), (4, 5, True)])
def test_a_run_that_is_all_warm_up_does_not_lag(warmup_steps: int, steps: int, lags: bool) -> None:
    assert Options(schedule="stale", warmup_steps=warmup_steps).lags_within(steps) is lags
    assert not Options(schedule="sync", warmup_steps=warmup_steps).lags_within(steps)


def test_nearest_word_always_proposes_something() -> None:
    assert nearest_word("zzz", ("one", "two")) == "one"
    assert nearest_word("", ("one", "two")) == "one"


def test_the_nearest_word_is_one_that_was_begun() -> None:
    assert nearest_word("a100", ("auto", "h100", "a100-80", "a100-40")) == "a100-80"


def test_backends_are_those_there_are() -> None:
    assert set(ATTENTION_BACKENDS) == {"auto", *BACKENDS}
