"""Downloads: first asked for, then fetched, with a line now and then.

Nothing is fetched before the hub has confirmed that this user may have the files, and told their sizes. The first
question is asked once: the libraries below repeat theirs for half a minute and longer where nobody answers.
"""

import errno
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.constants import ENDPOINT, HF_HUB_CACHE, HF_HUB_ETAG_TIMEOUT
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from clear_dist.cards.clear import radius_of
from clear_dist.cards.hub_name import HubFile
from clear_dist.launch.aside import in_background
from clear_dist.launch.ends import Failure, describe, say
from clear_dist.options import Refusal, nearest_word

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
NOT_GIVEN = (401, 403)
LOCAL_FILES = "local files (--model or --base FOLDER, --clear-weights FILE, --lora FILE)"
SECONDS_BETWEEN_FIGURES = 15.0
SECONDS_OF_REST = 60.0
"""Age from which a partial file counts as left over: there are file systems whose locks hold nobody back."""

Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Files of one repository, useless without `needed`; `nearest` is the flag to suggest in their place."""

    repository: str
    revision: str | None = None
    """Branch, tag or commit; None: the main branch."""
    patterns: tuple[str, ...]
    needed: str
    nearest: str


def ask(wants: Sequence[Wanted]) -> dict[Wanted, int]:
    """Bytes to download of each that lacks files, once all are known to be there and to fit on the disk.

    Raises as `hub.locate`.
    """
    missing = {want: size for want in wants if (size := _missing_bytes(want)) is not None}
    for want in missing:
        remove_leftovers(Path(HF_HUB_CACHE), _blobs(want).parent.name)
    require_disk_space(sum(missing.values()), " and ".join(want.repository for want in missing))
    return missing


def fetch(wants: Sequence[Wanted], *, quiet: bool = False) -> None:
    """Download missing files; raises as `hub.locate`."""
    for want, size in ask(wants).items():
        try:
            _download(want, size, quiet)
        except Exception as error:
            raise explained(want, error) from error


def cached(want: Wanted) -> Path | None:
    """The folder of the files, without asking the hub; None where they are not here, or a link leads to nothing."""
    try:
        folder = Path(_snapshot(want, want.revision, local_files_only=True))
    except (OSError, HFValidationError):
        return None
    held = [folder / want.needed, *(file for pattern in want.patterns for file in folder.glob(pattern))]
    return folder if all(file.exists() for file in held) else None


def require_disk_space(needed: int, what: str) -> None:
    """Raises a Refusal where the cache's disk has less than `needed` bytes free."""
    cache = Path(HF_HUB_CACHE)
    existing = next(folder for folder in (cache, *cache.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise Refusal(
            f"{cache} must have {needed / 1e9:.1f} GB free to download {what}, and has "
            f"{free / 1e9:.1f} GB; nearest: HF_HOME=FOLDER on a larger disk"
        )


def remove_leftovers(cache: Path, folder: str) -> int:
    """Remove partial files that nobody is writing from a repository's folder of the cache; returns their bytes."""
    removed = 0
    for file in (cache / folder / "blobs").glob("*.incomplete"):
        lock = cache / ".locks" / folder / f"{file.name.split('.')[0]}.lock"
        with suppress(OSError, Timeout):  # gone meanwhile, not ours to remove, or being written
            lock.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(lock, blocking=False):
                status = file.stat()
                if time.time() - status.st_mtime > SECONDS_OF_REST:
                    file.unlink()
                    removed += status.st_size
    return removed


def explained(want: Wanted, error: Exception) -> Refusal | Failure:
    repository = want.repository
    if isinstance(error, Refusal | Failure):
        return error
    if isinstance(error, HFValidationError):
        return Refusal(f"a name on the hub must be owner/name, got {repository} ({error}); nearest: {want.nearest}")
    if isinstance(error, GatedRepoError):
        return Refusal(
            f"the hub gives {repository} only to users who accepted its licence: do so on {ENDPOINT}/{repository}, "
            f"then `hf auth login`; nearest: {LOCAL_FILES}"
        )
    if isinstance(error, RevisionNotFoundError):
        return Refusal(
            f"the revision must be a branch, tag or commit of {repository}, got {want.revision!r}; nearest: main"
        )
    if isinstance(error, RepositoryNotFoundError):
        return Refusal(
            f"the hub has no {repository}, or does not show it to you (`hf auth login`); nearest: {want.nearest}"
        )
    if isinstance(error, HfHubHTTPError) and error.response.status_code in NOT_GIVEN:
        return Refusal(
            f"the hub does not give {repository} to you ({cause_of(error)}): `hf auth login`, or unset HF_TOKEN; "
            f"nearest: {LOCAL_FILES}"
        )
    if isinstance(error, OSError) and (error.errno in NO_SPACE or error.filename is not None):
        return Refusal(
            f"the hub's files must have a folder that can be written to and has room, got {HF_HUB_CACHE} "
            f"({error.strerror}); nearest: HF_HOME=FOLDER"
        )
    way_out = "unset it" if isinstance(error, OfflineModeIsEnabled) else "check the network and HF_ENDPOINT"
    return Failure(f"cannot get {repository} from the hub ({cause_of(error)}): {way_out}, or pass {LOCAL_FILES}")


def cause_of(error: BaseException) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, HfHubHTTPError):
        return error.server_message or f"status {error.response.status_code}"
    if isinstance(error, TimeoutError) and not str(error):
        return f"no answer within {HF_HUB_ETAG_TIMEOUT} s"
    return describe(error)


def _missing_bytes(want: Wanted) -> int | None:
    """Bytes to download; None where the hub gives nothing, and the files are here from before."""
    try:
        return _ask(want)
    except Exception as error:
        told = explained(want, error)
        held = None if isinstance(error, RevisionNotFoundError) or told is error else cached(want)
        if held is None:
            raise told from error
        say(f"warning: using {want.repository} as it was downloaded before; the hub did not give it: {cause_of(error)}")
        return None


def _ask(want: Wanted) -> int:
    """Bytes to download, by a dry run at the revision's commit."""
    about = partial(HfApi().model_info, want.repository, revision=want.revision, timeout=HF_HUB_ETAG_TIMEOUT)
    info = _answer(about)
    names = [file.rfilename for file in info.siblings or ()]
    if want.needed not in names:
        raise Refusal(
            f"{want.repository} on the hub must hold {want.needed}, and does not; nearest: {_nearest(want, names)}"
        )
    try:
        files = _answer(partial(_snapshot, want, info.sha, dry_run=True))
    except DryRunError as error:
        raise error.__cause__ or error from error
    return sum(file.file_size or 0 for file in files if file.will_download)


def _nearest(want: Wanted, names: Sequence[str]) -> str:
    """A flag that can be given instead: the likeliest file of the repository, of the kind that is wanted."""
    flag = want.nearest.split()[0]
    others = [name for name in names if "/" not in name and name.endswith(".safetensors")]
    alike = [name for name in others if (radius_of(name) is None) == (flag == "--lora")]
    if flag == "--model" or not alike:
        return want.nearest
    return f"{flag} {quote(str(HubFile(want.repository, want.revision, nearest_word(want.needed, alike))))}"


def _answer(ask: Callable[[], Answer]) -> Answer:
    """The hub's answer; raises TimeoutError where it is silent, also while its name is looked up."""
    return in_background(ask).result(timeout=HF_HUB_ETAG_TIMEOUT)


def _download(want: Wanted, size: int, quiet: bool) -> None:
    began, before = time.monotonic(), _bytes_in(_blobs(want))
    downloading = in_background(partial(_snapshot, want, want.revision))
    while not wait([downloading], SECONDS_BETWEEN_FIGURES).done:
        if not quiet:
            done = (_bytes_in(_blobs(want)) - before) / 1e9
            rate = done / (time.monotonic() - began)
            say(f"downloading {want.repository}: {done:.1f} of {size / 1e9:.1f} GB, {rate:.2f} GB/s")
    downloading.result()


def _snapshot(want: Wanted, revision: str | None, **how: Any) -> Any:
    """`snapshot_download` of the wanted files."""
    return snapshot_download(want.repository, revision=revision, allow_patterns=list(want.patterns), **how)


def _blobs(want: Wanted) -> Path:
    return Path(HF_HUB_CACHE, repo_folder_name(repo_id=want.repository, repo_type="model"), "blobs")


def _bytes_in(folder: Path) -> int:
    total = 0
    for file in folder.glob("*"):
        with suppress(FileNotFoundError):  # a partial file gets its name when it is whole
            total += file.stat().st_size
    return total
