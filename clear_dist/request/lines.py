"""Lists of prompts: text files of a prompt a line, and JSONL files whose lines have more of their own."""

import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from clear_dist.launch.env import Place
from clear_dist.options import Refusal, check_encoding, check_whole_number, nearest_word, shortened
from clear_dist.request.flags import PICTURE_ENDINGS, SIDES, read_res

JSONL = ".jsonl"
KINDS: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {"prompt": (str,), "negative_prompt": (str,), "seed": (int,), "size": (int, str), "output": (str,)}
)
"""Names that a line may have, with the types of their values."""
SEEDS = (0, 2**63 - 1)


@dataclass(frozen=True, kw_only=True)
class Line:
    """What a line of a list says of its picture; None: what the flags say."""

    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None
    height: int | None = None
    """Pixels."""
    width: int | None = None
    output: Path | None = None

    @property
    def is_prompt_alone(self) -> bool:
        return self == Line(prompt=self.prompt)


def read_list(file: Path, place: Place) -> tuple[Line, ...]:
    """Lines of `--prompts`; raises a Refusal where it cannot be read, or for the first line that is wrong."""
    texts = lines_of(file, place)
    if file.suffix.lower() != JSONL:
        return tuple(Line(prompt=text) for text in texts)
    return tuple(_line(text, f"line {number} of {file.name}") for number, text in enumerate(texts, 1))


def lines_of(file: Path, place: Place, flag: str = "--prompts") -> tuple[str, ...]:
    """Prompts as given; a pipe can be read once only, so not by each of torchrun's ranks."""
    try:
        if place.world_size > 1 and stat.S_ISFIFO(file.stat().st_mode):
            raise Refusal(f"{flag} must be a file under torchrun, got the pipe {file}; nearest: --nproc")
        text = file.read_text(encoding="utf-8-sig")  # any file's lines end in \n here; `splitlines` knows ten more ends
    except (OSError, UnicodeDecodeError) as error:
        why, shown = getattr(error, "strerror", None) or "not UTF-8", shortened(str(file))
        raise Refusal(f"{flag} must be a text file, one prompt a line, got {shown} ({why})") from error
    given = tuple(line.strip() for line in text.split("\n") if line.strip())
    if not given:
        raise Refusal(f"{flag} must hold at least one prompt, got the empty file {file}")
    return given


def _line(text: str, where: str) -> Line:
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"{where} must be a JSON object, got {shortened(text)!r} ({error})") from error
    if not isinstance(given, dict) or "prompt" not in given:
        nearest = '{"prompt": "a fox", "seed": 1, "size": "1024x768", "output": "fox.png"}'
        raise Refusal(f"{where} must be a JSON object with a prompt, got {shortened(text)!r}; nearest: {nearest}")
    for name, value in given.items():
        if name not in KINDS:
            nearest = nearest_word(name, list(KINDS))
            raise Refusal(f"{where} may have {', '.join(KINDS)}, got {shortened(name)!r}; nearest: {nearest}")
        if not isinstance(value, KINDS[name]) or isinstance(value, bool):
            kind = "a whole number" if name == "seed" else "a text"
            raise Refusal(f"{name} in {where} must be {kind}, got {shortened(json.dumps(value))}")
        check_encoding(f"{name} in {where}", value)
    if "seed" in given:
        check_whole_number(f"seed in {where}", given["seed"], *SEEDS)
    return Line(
        prompt=given["prompt"],
        negative_prompt=given.get("negative_prompt"),
        seed=given.get("seed"),
        output=_output(given, where),
        **_size(given, where),
    )


def _size(given: Mapping[str, Any], where: str) -> dict[str, int]:
    if "size" not in given:
        return {}
    try:
        size = read_res(str(given["size"]))
    except ValueError as error:
        shown = shortened(str(given["size"]))
        raise Refusal(f"size in {where} must be a side or WIDTHxHEIGHT, got {shown!r}; nearest: 1024x768") from error
    width, height = size if isinstance(size, tuple) else (size, size)
    for side in (width, height):
        check_whole_number(f"size in {where}", side, *SIDES)
    return {"width": width, "height": height}


def _output(given: Mapping[str, Any], where: str) -> Path | None:
    if "output" not in given:
        return None
    output = Path(given["output"])
    if output.suffix.lower() not in PICTURE_ENDINGS or output.name.lower() in PICTURE_ENDINGS:
        nearest = f"{output.stem or 'picture'}{nearest_word(output.suffix.lower(), PICTURE_ENDINGS)}"
        shown, endings = shortened(str(output)), ", ".join(PICTURE_ENDINGS)
        raise Refusal(f"output in {where} must end in {endings}, got {shown!r}; nearest: {nearest}")
    return output
