"""What safetensors files say of themselves: names and shapes, from their first bytes, without torch."""

import json
from collections.abc import Mapping
from pathlib import Path

from clear_dist.config import Refusal

Shapes = Mapping[str, tuple[int, ...]]

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
LONGEST_HEADER = 100_000_000
"""Bytes, as the safetensors library has it."""


def read_shapes(file: Path) -> Shapes:
    """Name and shape of every tensor in `file`.

    Raises:
        Refusal: it is missing, empty, pickled, truncated, or no safetensors file.
    """
    if file.suffix in PICKLED:
        raise Refusal(f"weights must be safetensors, got the pickled file {file}; nearest: {file.stem}.safetensors")
    if not file.is_file():
        raise Refusal(f"there is no file {file}; weights must be a safetensors file")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise Refusal(
                f"weights must be a complete safetensors file, got {file} of {size} bytes: cut off, or something else"
            )
        try:
            header = json.loads(stream.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            shapes = {name: tuple(entry["shape"]) for name, entry in tensors.items()}
            end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise Refusal(f"weights must be a safetensors file, got {file}, which is of another format") from error
    if size != 8 + length + end:
        raise Refusal(f"{file} must have {8 + length + end} bytes by its own header, got {size}; download it again")
    return shapes


def read_component(folder: Path, stem: str) -> Shapes:
    """All tensors of a model's component: one file, or the files that its index names.

    Raises:
        Refusal: there are no weights, only pickled ones, or a file of the index is missing or damaged.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        return {name: shape for file in names for name, shape in read_shapes(folder / file).items()}
    file = folder / f"{stem}.safetensors"
    pickled = sorted(other for other in folder.glob("*") if other.suffix in PICKLED) if folder.is_dir() else []
    if not file.is_file() and pickled:
        raise Refusal(f"weights must be safetensors, got the pickled file {pickled[0]}; nearest: {file.name}")
    return read_shapes(file)


def read_json(file: Path) -> dict:
    """The object in a JSON file.

    Raises:
        Refusal: the file is missing, or holds no JSON object.
    """
    try:
        value = json.loads(file.read_text())
    except FileNotFoundError:
        raise Refusal(f"there is no file {file}; a model folder must have diffusers' layout") from None
    except (OSError, ValueError) as error:
        raise Refusal(f"{file} must be a JSON file, and is not: {error}") from error
    if not isinstance(value, dict):
        raise Refusal(f"{file} must hold a JSON object, got {type(value).__name__}")
    return value


def compare(expected: Shapes, got: Shapes, where: Path | str) -> None:
    """Raises a Refusal that names the first tensor that is missing, unexpected or of another shape."""
    missing, unexpected = sorted(expected.keys() - got.keys()), sorted(got.keys() - expected.keys())
    for kind, names in (("lacks", missing), ("has an unexpected tensor", unexpected)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise Refusal(f"{where} {kind} {names[0]}{more}; are these the weights of another model?")
    for name, shape in expected.items():
        if got[name] != shape:
            raise Refusal(f"{name} must have the shape {list(shape)}, got {list(got[name])} in {where}")
