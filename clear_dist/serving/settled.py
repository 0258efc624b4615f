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
from clear_dist.request.flags import PictureFlags
from clear_dist.request.request import Request
from clear_dist.request.serve import ServeFlags
from clear_dist.request.settle import settle, understood
from clear_dist.serving.errors import ApiError, refused
from clear_dist.serving.loras import file_of
from clear_dist.serving.schema import LOW, Drawn, Edit
from clear_dist.serving.uploads import MASK, PARTS

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
        """The request whose pictures are called after `file`, and lie in its folder; raises ApiError.

        It may take seconds, for the first of a shape.
        """
        self._check_held(asked)
        try:
            flags = self._flags(asked)
            if isinstance(asked, Edit):
                return self._of_shape(self._from_picture(asked, flags, file), asked, flags, file)
        except Refusal as error:
            raise refused(error) from error
        shape = {name: value for name, value in flags.items() if name not in ("seed", "negative_prompt")}
        shape |= {"is_guided": "negative_prompt" in flags, "ending": file.suffix}
        return self._of_shape(self._once(repr(sorted(shape.items())), flags, file), asked, flags, file)

    def _once(self, key: str, flags: Mapping[str, Any], file: Path) -> Request:
        known = self._known.get(key)
        if known is None:
            with self._lock:  # one plan at a time: shapes that are known need not wait for it
                known = self._known.get(key) or self._found(flags, file)
                while len(self._known) >= MOST_SHAPES:
                    self._known.pop(next(iter(self._known)))
                self._known[key] = known
        if isinstance(known, ApiError):
            raise known
        return known

    def _found(self, flags: Mapping[str, Any], file: Path) -> Request | ApiError:
        try:
            return self._fitting(self.start.flags.for_pictures(prompt="", output=file, **flags))
        except Refusal as error:
            return refused(error)

    def _from_picture(self, asked: Edit, flags: dict[str, Any], file: Path) -> Request:
        picture, mask = (file.with_name(PARTS[name]) for name in ("image", MASK))
        if asked.use == "upscale":
            rest = {name: value for name, value in flags.items() if name != "num_images"}
            given: PictureFlags = self.start.flags.for_upscaling(picture, asked.prompt, output=file, **rest)
        else:
            masked = {"mask": mask} if mask.exists() else {}
            given = self.start.flags.for_pictures(prompt="", output=file, image=picture, **masked, **flags)
        with self._lock:
            return self._fitting(given)

    def _fitting(self, given: PictureFlags) -> Request:
        """A request that fits, as far as anybody knows; raises a Refusal."""
        start = self.start
        request, facts, _ = settle(given, start.place, CARDS)
        if request.height is not None and max(request.size) > start.flags.max_side:
            most = start.flags.max_side
            raise Refusal(f"--res must be at most {most} here, got {max(request.size)}; nearest: {most}")
        check = fit_here.begin(request, facts, start.place, start.room)
        if check is not None:
            check.line()
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

    def _flags(self, asked: Drawn) -> dict[str, Any]:
        flags, folder = asked.flags(), self.start.flags.lora_dir
        if asked.lora:
            flags["lora"] = [f"{file_of(folder, each.name)}:{each.weight!r}" for each in asked.lora]
        if asked.quality == LOW and asked.steps is None:
            flags["steps"] = max(1, self.start.request.sampling.steps // 2)
        return flags


def files_of(request: Request) -> tuple[Path, ...]:
    return tuple(numbered(request.output, index, request.num_images) for index in range(request.num_images))
