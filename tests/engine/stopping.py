"""A forward that breaks off in the midst of a layer."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

from clear_dist.attention import Backend
from clear_dist.engine.striped import require_striped


class Stop(Exception):
    pass


def stop_in_attention(pipe: Any, number: int) -> None:
    """Raise `Stop` in call `number` of windowed attention on this rank, the first being 1; later ones run."""
    striped, numbers = require_striped(pipe), count(1)
    choose = striped.settings.choose_backend

    def stop_once(attend: Callable[[Any], Any], call: Any) -> Any:
        if next(numbers) == number:
            raise Stop
        return attend(call)

    def choose_stopping(**sizes: int) -> Backend:
        backend = choose(**sizes)
        return replace(backend, run=partial(stop_once, backend.run))

    striped.settings = replace(striped.settings, choose_backend=choose_stopping)
