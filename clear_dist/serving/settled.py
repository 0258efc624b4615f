"""Requests of a server, checked by the rules of the command line, and by a plan for each shape, before they wait."""

import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clear_dist.cards.folder import ModelFacts
from clear_dist.families.cards import CARDS
from clear_dist.launch.env import Place
from clear_dist.options import Refusal, check_encoding
from clear_dist.pictures import numbered
from clear_dist.plan import Room, fit_here
from clear_dist.request.request import Request
from clear_dist.request.serve import ServeFlags
from clear_dist.request.settle import settle, understood
from clear_dist.serving.errors import ApiError, refused
from clear_dist.serving.schema import LOW, Drawn

SEED_BITS = 32
MOST_SHAPES = 256
"""Kept; a client may ask for as many as it likes."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a server knows before its ranks start."""

    flags: ServeFlags
    request: Request
    """That the model is loaded for."""
    facts: ModelFacts
    place: Place
    """Of the command, not of its ranks."""
    room: Room
    """Memory that was free before the model was loaded."""
    key: str | None

    @property
    def model_name(self) -> str:
        return "demo" if self.facts.is_demo else Path(self.facts.name).name


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What was settled once for pictures of a shape, and whether it fits."""

    start: Start
    _known: dict[Any, Request | ApiError] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def settled(self, asked: Drawn, file: Path) -> Request:
        """The request whose pictures are called after `file`; raises ApiError.

        It may take seconds, for the first of a shape.
        """
        self._check_held(asked)
        flags = self._with_quality(asked)
        shape = {name: value for name, value in flags.items() if name not in ("seed", "negative_prompt")}
        shape |= {"is_guided": "negative_prompt" in flags, "ending": file.suffix}
        key = tuple(sorted(shape.items()))
        with self._lock:
            if key not in self._known:
                while len(self._known) >= MOST_SHAPES:
                    self._known.pop(next(iter(self._known)))
                self._known[key] = self._found(flags, file)
            known = self._known[key]
        if isinstance(known, ApiError):
            raise known
        return self._of_shape(known, asked, flags, file)

    def _found(self, flags: Mapping[str, Any], file: Path) -> Request | ApiError:
        start = self.start
        try:
            given = start.flags.for_pictures(prompt="", output=file, **flags)
            request, facts, _ = settle(given, start.place, CARDS)
            check = fit_here.begin(request, facts, start.place, start.room)
            if check is not None:
                check.line()
        except Refusal as error:
            return refused(error)
        return request

    def _of_shape(self, known: Request, asked: Drawn, flags: Mapping[str, Any], file: Path) -> Request:
        facts = self.start.facts
        try:
            check_encoding("--prompt", asked.prompt)
            check_encoding("--negative-prompt", asked.negative_prompt)
        except Refusal as error:
            raise refused(error) from error
        prompt = understood(asked.prompt, facts) or ""
        negative = facts.negative_prompt if asked.negative_prompt is None else asked.negative_prompt
        own: dict[str, Any] = {"prompts": (prompt,), "negative_prompt": understood(negative, facts), "output": file}
        seed = flags.get("seed")
        return replace(known, seed=secrets.randbits(SEED_BITS) if seed is None else seed, **own)

    def _check_held(self, asked: Drawn) -> None:
        """Raises ApiError for settings that the model, as it is held, does not have."""
        held = self.start.request
        for name in ("window", "text_attention"):
            given, own = getattr(asked, name), getattr(held, name)
            if given not in (None, own):
                raise ApiError(400, f"{name} must be {own} on this server, got {given}; nearest: {own}", param=name)

    def _with_quality(self, asked: Drawn) -> dict[str, Any]:
        flags = asked.flags()
        if asked.quality == LOW and asked.steps is None:
            flags["steps"] = max(1, self.start.request.sampling.steps // 2)
        return flags


def files_of(request: Request) -> tuple[Path, ...]:
    return tuple(numbered(request.output, index, request.num_images) for index in range(request.num_images))
