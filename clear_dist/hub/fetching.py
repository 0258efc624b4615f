"""Downloads: asked for first, then fetched, with a word now and then.

One request asks what there is before anything is downloaded: whether the hub answers at all, gives these files to this
user, and how large they are. The libraries below ask again and again, for half a minute and longer.
"""

import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url, snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_ETAG_TIMEOUT
from huggingface_hub.errors import HFValidationError, RevisionNotFoundError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    filter_repo_objects,
)

from clear_dist.comm.ends import say
from clear_dist.comm.in_touch import in_background
from clear_dist.config import Refusal, nearest_word
from clear_dist.hub.leftovers import remove_leftovers
from clear_dist.hub.wanted import Wanted, cause_of, explained

SECONDS_BETWEEN_FIGURES = 15.0


def fetch(wants: Sequence[Wanted]) -> None:
    """Download what this machine lacks; nothing is downloaded before all of it is known to be there, and to fit.

    Raises:
        Refusal, Failure: as `hub.locate`.
    """
    missing = {want: size for want in wants if (size := _missing_bytes(want)) is not None}
    for want in missing:
        remove_leftovers(Path(HF_HUB_CACHE), _blobs(want).parent.name)
    require_room(sum(missing.values()), " and ".join(want.repository for want in missing))
    for want, size in missing.items():
        try:
            _download(want, size)
        except Exception as error:
            raise explained(want, error) from error


def cached(want: Wanted) -> Path | None:
    """Where the files lie, without asking the hub; None where they are not here."""
    try:
        folder = snapshot_download(
            want.repository, revision=want.revision, allow_patterns=list(want.patterns), local_files_only=True
        )
    except (OSError, HFValidationError):
        return None
    return Path(folder) if Path(folder, want.needed).exists() else None


def require_room(needed: int, what: str) -> None:
    """Raises a Refusal where the cache's disk has no room for so many bytes."""
    cache = Path(HF_HUB_CACHE)
    existing = next(folder for folder in (cache, *cache.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise Refusal(
            f"{cache} must have {needed / 1e9:.1f} GB free to download {what}, and has "
            f"{free / 1e9:.1f} GB; nearest: HF_HOME=FOLDER on a larger disk"
        )


def _missing_bytes(want: Wanted) -> int | None:
    """How much is to be downloaded; None where the hub gives nothing, and the files are here from before."""
    asking = in_background(partial(_ask, want))
    try:
        info = asking.result(timeout=HF_HUB_ETAG_TIMEOUT)
    except Exception as error:
        told = explained(want, error)
        held = None if isinstance(error, RevisionNotFoundError) or told is error else cached(want)
        if held is None:
            raise told from error
        say(f"warning: using {want.repository} as it was downloaded before; the hub did not give it: {cause_of(error)}")
        return None
    files = filter_repo_objects(info.siblings, allow_patterns=list(want.patterns), key=lambda file: file.rfilename)
    hashes = ((file, file.lfs.sha256 if file.lfs else file.blob_id) for file in files)
    return sum(file.size or 0 for file, name in hashes if name is None or not (_blobs(want) / name).exists())


def _ask(want: Wanted) -> Any:
    """One request, two where a licence must be accepted; none is repeated."""
    timeout = HF_HUB_ETAG_TIMEOUT
    info = HfApi().model_info(want.repository, revision=want.revision, files_metadata=True, timeout=timeout)
    names = [file.rfilename for file in info.siblings or ()]
    if want.needed not in names:
        alike = [name for name in names if "/" not in name and name.endswith(".safetensors")]
        by_name = want.needed.endswith(".safetensors") and alike
        nearest = f"--clear-weights {want.repository}:{nearest_word(want.needed, alike)}" if by_name else want.nearest
        raise Refusal(f"{want.repository} on the hub must hold {want.needed}, and does not; nearest: {nearest}")
    if info.gated:  # everyone may see what there is; only a file tells whether it is given
        get_hf_file_metadata(hf_hub_url(want.repository, want.needed, revision=info.sha), timeout=timeout)
    return info


def _download(want: Wanted, size: int) -> None:
    """With a word now and then: how much of the `size` bytes is here, and how fast it comes."""
    began, before = time.monotonic(), _bytes_in(_blobs(want))
    download = partial(snapshot_download, want.repository, revision=want.revision, allow_patterns=list(want.patterns))
    with _without_bars():
        downloading = in_background(download)
        while not wait([downloading], SECONDS_BETWEEN_FIGURES).done:
            done = (_bytes_in(_blobs(want)) - before) / 1e9
            rate = done / (time.monotonic() - began)
            say(f"downloading {want.repository}: {done:.1f} of {size / 1e9:.1f} GB, {rate:.2f} GB/s")
    downloading.result()


def _blobs(want: Wanted) -> Path:
    """Where the cache keeps files, by their hash, and partial ones too."""
    return Path(HF_HUB_CACHE, repo_folder_name(repo_id=want.repository, repo_type="model"), "blobs")


def _bytes_in(folder: Path) -> int:
    total = 0
    for file in folder.glob("*"):
        with suppress(FileNotFoundError):  # a partial file gets its name when it is whole
            total += file.stat().st_size
    return total


@contextmanager
def _without_bars() -> Iterator[None]:
    """The library's bars fill logs, and are drawn over by ours."""
    were_off = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            enable_progress_bars()
