"""Headers of safetensors files and numbers of JSON configurations, read and checked without torch."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clear_dist.cards.clear import PICKLED, Shapes, refuse_pickled
from clear_dist.options import Refusal, shortened

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]

PICKLES = (b"PK\x03\x04", *(bytes((0x80, protocol)) for protocol in range(2, 6)))
"""First bytes of torch's archives and of pickles themselves."""
PART_OF_SEVERAL = re.compile(r"-\d+-of-\d+\.")
LONGEST_HEADER = 100_000_000
"""Bytes; the safetensors library's own limit."""
LARGEST_NUMBER = 65_536
"""Bound for layers, channels or pixels in a configuration."""


def read_shapes(file: Path) -> Shapes:
    """Shapes by name; raises as `read_tensors`."""
    return {name: shape for name, (_, shape) in read_tensors(file).items()}


def read_tensors(file: Path) -> Tensors:
    """Dtype (such as "BF16") and shape by name; raises a Refusal for a missing, pickled, truncated or foreign file."""
    return read_header(file)[0]


def read_header(file: Path) -> tuple[Tensors, Mapping[str, str]]:
    """Tensors, and what else the file tells of itself; raises as `read_tensors`."""
    refuse_pickled(file)
    if not file.is_file():
        what = f"{file} is a link to nothing" if file.is_symlink() else f"there is no file {file}"
        raise Refusal(f"{what}; weights must be a safetensors file: download it again")
    size = file.stat().st_size
    with file.open("rb") as stream:
        first = stream.read(8)
        length = int.from_bytes(first, "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            if first.startswith(PICKLES):
                raise Refusal(f"weights must be safetensors, got pickle in {file}; download it again")
            if first.startswith(b"GGUF"):
                raise Refusal(f"weights must be safetensors, got GGUF in {file}; nearest: the 16-bit file, with --int8")
            raise Refusal(
                f"weights must be a complete safetensors file, got {file} of {size} bytes: cut off, or something else"
            )
        try:
            header = json.loads(stream.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            kinds = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in tensors.items()}
            metadata = dict(header.get("__metadata__") or {})
            end = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
        except (ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
            raise Refusal(f"weights must be a safetensors file, got {file}, which is of another format") from error
    if size != 8 + length + end:
        raise Refusal(f"{file} must have {8 + length + end} bytes by its own header, got {size}; download it again")
    return kinds, metadata


def read_component(folder: Path, stem: str) -> Shapes:
    """Shapes of a model's part by name; raises as `component_files` and `read_tensors`."""
    return {name: shape for file in component_files(folder, stem) for name, shape in read_shapes(file).items()}


def component_files(folder: Path, stem: str) -> list[Path]:
    """Weight files of a model's part; raises a Refusal where they are missing or pickled, or their index is damaged."""
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) and file == Path(file).name for file in weight_map.values()
        ):
            raise Refusal(f"weight_map in {index} must give a file for each tensor; download it again")
        files = sorted({folder / file for file in weight_map.values()})
        for file in files:
            if not file.is_file() and file.suffix not in PICKLED:
                raise Refusal(f"there is no file {file}, which {index.name} names; download it again")
        return files
    file = folder / f"{stem}.safetensors"
    if not os.path.lexists(file) and folder.is_dir():
        _refuse_others(file, index)
    return [file]


def _refuse_others(file: Path, index: Path) -> None:
    others = sorted(file.parent.iterdir())
    for other in others:
        if other.suffix in PICKLED:
            raise Refusal(f"weights must be safetensors, got the pickled file {other}; nearest: {file.name}")
    for other in others:
        if other.suffix == file.suffix and PART_OF_SEVERAL.search(other.name):
            raise Refusal(f"there is {other.name} and no {index}, which names all such files; download it again")
        if other.suffix == file.suffix:
            raise Refusal(f"there is no file {file}; nearest: {other.name}, renamed, if it is a variant of it")


def read_json(file: Path) -> dict:
    """The object in a JSON file; raises a Refusal where there is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Refusal(f"there is no file {file}; a model folder must have diffusers' layout") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Refusal(f"{file} must be a JSON file, and is not: {error}; download it again") from error
    if not isinstance(value, dict):
        raise Refusal(f"{file} must hold a JSON object, got {type(value).__name__}")
    return value


def whole_number(config: Mapping[str, Any], name: str, default: int, where: Path | str) -> int:
    """The number `name` of a configuration; raises a Refusal unless it is a whole one from 1 to LARGEST_NUMBER."""
    return _checked(config.get(name, default), name, default, where)


def whole_numbers(config: Mapping[str, Any], name: str, default: tuple[int, ...], where: Path | str) -> tuple[int, ...]:
    """The list `name` of a configuration; raises a Refusal where it is empty, or as `whole_number` does."""
    values = config.get(name, default)
    if not isinstance(values, list | tuple) or not values:
        raise Refusal(f"{name} must be a list of numbers, got {_shown(values)} in {where}; nearest: {list(default)}")
    return tuple(_checked(value, name, default[0], where) for value in values)


def positive_number(config: Mapping[str, Any], name: str, default: float, where: Path | str) -> float:
    """The number `name` of a configuration; raises a Refusal unless it is above 0."""
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LARGEST_NUMBER:
        raise Refusal(f"{name} must be a number above 0, got {_shown(value)} in {where}; nearest: {default:g}")
    return value


def _checked(value: object, name: str, default: int, where: Path | str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST_NUMBER:
        raise Refusal(
            f"{name} must be a whole number from 1 to {LARGEST_NUMBER}, got {_shown(value)} in {where}; "
            f"nearest: {default}"
        )
    return value


def _shown(value: object) -> str:
    return shortened(json.dumps(value))
