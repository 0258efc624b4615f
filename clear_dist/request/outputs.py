"""Files that a request will write: their names, folders, and room on the disk."""

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from math import prod
from pathlib import Path

from clear_dist.options import Refusal, nearest_word, shortened
from clear_dist.pictures import files_of, preview_of, stage_file
from clear_dist.request.flags import PICTURE_ENDINGS
from clear_dist.request.request import PROFILE_ENDINGS, Request

SHARE_OF_LOWER_STAGES = 0.5
"""Most pixels of all lower stages per pixel of the last: each has about a quarter of the next one's."""
TOKEN_BYTES = 64 * 4
"""Channels of a token's latents, of at most 4 bytes."""


def check_outputs(request: Request) -> None:
    """Raises a Refusal for an unknown ending, a folder that is missing or cannot be written to, or a full disk."""
    output, latents_out, report = request.output, request.latents_out, request.report
    sizes = [request.alone(index).size for index in range(len(request.prompts))]
    pixels = sum(map(prod, sizes)) * request.num_images
    check_file("--output", output, PICTURE_ENDINGS)
    for own in {line.output for line in request.lines if line.output is not None}:
        check_file("output in --prompts", own, PICTURE_ENDINGS)
    kept = 1 + SHARE_OF_LOWER_STAGES * request.save_stages
    channels = 3 + any(picture.has_alpha for picture in request.pictures)
    needed = {output.resolve().parent: round(pixels * channels * kept)}
    if latents_out is not None:
        check_file("--latents-out", latents_out, (".safetensors",))
        if len(set(sizes)) > 1:
            shown = ", ".join(f"{width}x{height}" for height, width in dict.fromkeys(sizes))
            raise Refusal(
                f"--latents-out takes pictures of one size, got {shortened(shown)}; nearest: --height, --width"
            )
        folder = latents_out.resolve().parent
        needed[folder] = needed.get(folder, 0) + pixels * TOKEN_BYTES // request.token_size**2
    if report is not None:
        check_file("--report", report, (".json",))
    if request.profile is not None:
        check_file("--profile", request.profile, PROFILE_ENDINGS)
    written = list(_written(request))
    named = (("--profile", request.traces, PROFILE_ENDINGS), ("--output", written, PICTURE_ENDINGS))
    for name, files, endings in named:
        for file in files:
            refuse_folder(name, file, endings)
            if file.is_symlink():
                check_file(name, file, endings)
    read = dict.fromkeys(file for picture in request.pictures for file in (picture.file, picture.mask))
    given = (*written, latents_out, report, *request.traces, *read)
    used = [file.resolve() for file in given if file is not None]
    if len(set(used)) < len(used):
        again = next(file for index, file in enumerate(used) if file in used[:index])
        flags = {"--report": report, "--latents-out": latents_out}
        clashing = ((flag, file) for flag, file in flags.items() if file is not None and file.resolve() == again)
        flag, mine = next(clashing, ("--output", output))
        raise Refusal(
            f"the picture to start from and all that is written must be different files, got {again.name} twice; "
            f"nearest: {flag} {mine.with_name(f'{mine.stem}-new{mine.suffix}')}"
        )
    for folder, size in needed.items():
        free = shutil.disk_usage(folder).free
        if free < size:
            raise Refusal(
                f"{folder} must have {size / 1e6:.0f} MB free for this request, and has {free / 1e6:.0f} MB; "
                f"nearest: --output {Path(tempfile.gettempdir()) / output.name}"
            )


@contextmanager
def claimed(given: Iterable[Path | None], *, rank: int = 0) -> Iterator[Path | None]:
    """Hold files or folders for this process, until it ends, even if it is killed; yields what another one holds.

    A byte for each name in a file of the user's, which machines of a cluster share as they share the home folder. Ranks
    but 0, which write nothing, hold nothing.
    """
    if rank:
        yield None
        return
    try:
        locks = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "clear-dist", "outputs")
        locks.parent.mkdir(parents=True, exist_ok=True)
        stream = locks.open("ab")
    except (OSError, RuntimeError):  # no home, or one that cannot be written to, ends no work
        yield None
        return
    with stream:
        yield next((file for file in given if file is not None and not _is_free(stream.fileno(), file)), None)


def _is_free(locks: int, file: Path) -> bool:
    place = int.from_bytes(sha256(os.fsencode(file.resolve())).digest()[:7])
    try:
        fcntl.lockf(locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks
        pass
    return True


def require_free(taken: Path | None) -> None:
    """Raises a Refusal for a file or folder that another running job will write."""
    if taken is not None:
        nearest = taken.with_name(f"{taken.stem}-new{taken.suffix}")
        raise Refusal(f"two running jobs cannot write the same file or folder, got {taken}; nearest: {nearest}")


def _written(request: Request) -> Iterator[Path]:
    """Pictures, those of lower stages, thumbnails and previews."""
    for index, output in enumerate(request.outputs):
        stages = request.alone(index // request.num_images).stages
        for stage in stages if request.save_stages else stages[-1:]:
            file = output if stage is stages[-1] else stage_file(output, *stage.size)
            yield from files_of(file, height=stage.height, width=stage.width)
    if request.preview_every is not None:
        yield preview_of(request.output)


def check_file(name: str, file: Path, endings: tuple[str, ...]) -> None:
    """Raises a Refusal unless `file` has one of `endings` and can be created or replaced."""
    refuse_folder(name, file, endings)
    nameless = file.name.lower() in ("", *endings)
    if nameless or not file.name.lower().endswith(endings):
        ending = nearest_word(file.suffix.lower(), endings)
        nearest = f"clear-dist{ending}" if nameless else file.with_suffix(ending)
        raise Refusal(f"{name} must end in {', '.join(endings)}, got {str(file)!r}; nearest: {nearest}")
    folder = file.resolve().parent  # a symlink is written through
    if not folder.is_dir():
        existing = next(parent for parent in folder.absolute().parents if parent.is_dir())
        raise Refusal(f"{name} must lie in a folder that exists, got {file}; nearest: {existing / file.name}")
    try:
        tempfile.TemporaryFile(dir=folder).close()  # a superuser may write everywhere, but not on every file system
    except OSError as error:
        raise Refusal(
            f"{name} must lie in a folder that can be written to, got {file} ({error.strerror}); "
            f"nearest: {Path(tempfile.gettempdir()) / file.name}"
        ) from error


def refuse_folder(name: str, file: Path, endings: tuple[str, ...]) -> None:
    try:
        mode = file.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise Refusal(
            f"{name} must be a file that can be written, got {shortened(str(file))!r} of {len(os.fsencode(file.name))} "
            f"bytes ({error.strerror}); nearest: clear-dist{endings[0]}"
        ) from error
    if stat.S_ISDIR(mode):
        raise Refusal(f"{name} must be a file, got the folder {file}; nearest: {file / f'clear-dist{endings[0]}'}")
    if not stat.S_ISREG(mode):  # it would be replaced by a file
        raise Refusal(f"{name} must be a file, got {file}, which is none; nearest: clear-dist{endings[0]}")
