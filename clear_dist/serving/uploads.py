"""Pictures that clients send: a few kinds only, of a bounded size, looked at before anything is decoded."""

from collections.abc import Mapping
from pathlib import Path

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from PIL import Image
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile

from clear_dist.serving.errors import ApiError, of_validation
from clear_dist.serving.schema import Edit

KINDS = ("PNG", "JPEG", "WEBP", "MPO")
"""Pillow's; MPO is what some cameras call their JPEG."""
IMAGES = ("image", "image[]")
MASK = "mask"
MOST_FIELDS, MOST_FILES = 64, 17
PARTS = {"image": "given", MASK: "given-mask"}
"""Names of a job's files."""


async def edit_of(request: Request) -> tuple[Edit, Mapping[str, bytes]]:
    """What a form asks for, and its pictures by name; raises ApiError."""
    async with request.form(max_fields=MOST_FIELDS, max_files=MOST_FILES, max_part_size=2**20) as form:
        files = {name: await part.read() for name, part in _pictures(form).items()}
        fields = {name: value for name, value in form.multi_items() if isinstance(value, str)}
    try:
        return await run_in_threadpool(Edit.model_validate, fields), files
    except ValidationError as error:
        raise of_validation(error.errors()) from error  # type: ignore[arg-type]


def _pictures(form: FormData) -> dict[str, UploadFile]:
    images = [part for name, part in form.multi_items() if name in IMAGES and isinstance(part, UploadFile)]
    if len(images) != 1:
        raise ApiError(400, f"image must be one picture here, got {len(images)}", param="image")
    masks = [part for name, part in form.multi_items() if name == MASK and isinstance(part, UploadFile)]
    others = {name for name, part in form.multi_items() if isinstance(part, UploadFile)} - {*IMAGES, MASK}
    if others or len(masks) > 1:
        raise ApiError(400, "files must be image and at most one mask", param=min(others, default=MASK))
    return {"image": images[0], **({MASK: masks[0]} if masks else {})}


def written(pictures: Mapping[str, bytes], folder: Path, most_pixels: int) -> None:
    """Write pictures into a job's folder; raises ApiError for what is none, or too large."""
    for name, content in pictures.items():
        file = folder / PARTS[name]
        file.write_bytes(content)
        check(file, name, most_pixels)


def check(file: Path, name: str, most_pixels: int) -> None:
    try:
        with Image.open(file, formats=KINDS) as picture:
            width, height = picture.size
    except Exception as error:  # Pillow's for damaged files are of a dozen kinds
        raise ApiError(400, f"{name} must be a picture, PNG, JPEG or WebP", param=name) from error
    if width * height > most_pixels:
        raise ApiError(400, f"{name} must have at most {most_pixels} pixels, got {width} x {height}", param=name)
