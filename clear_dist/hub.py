"""Files from the hub: fetched once per machine, while the ranks keep in touch; what goes wrong is one line."""

from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from clear_dist import preflight
from clear_dist.comm.group import Group
from clear_dist.config import FLUX_DEV, Refusal, Request

PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
WANTED = (
    "model_index.json",
    *(f"{part}/*.{ending}" for part in PARTS for ending in ("json", "safetensors", "txt", "model")),
)
SECONDS_BETWEEN_WORDS = 1.0


def locate(request: Request, group: Group, *, local_rank: int) -> Request:
    """The request with its model and CLEAR weights as local files, downloaded once per machine where they are not.

    Raises:
        Refusal: the hub has no such model or file, or does not give it to this user; or what it gave does not fit.
        RuntimeError: the hub cannot be reached.
    """
    checkpoint = request.clear_weights
    hub_checkpoint = checkpoint if checkpoint is not None and not Path(checkpoint).exists() else None
    if request.from_folder and hub_checkpoint is None:
        return request
    fetching = None
    if local_rank == 0:
        fetching = ThreadPoolExecutor(1).submit(_fetch, request, hub_checkpoint, offline=False)
    # A download may take longer than a group waits for a rank that is silent, so the ranks keep in touch meanwhile.
    while group.agree(_is_underway(fetching)):
        pass
    folder, checkpoint_file = _fetch(request, hub_checkpoint, offline=True)
    if not request.from_folder:
        return preflight.located(request, folder, checkpoint_file or checkpoint)
    return replace(request, clear_weights=checkpoint_file)


def _fetch(request: Request, hub_checkpoint: str | None, *, offline: bool) -> tuple[Path, str | None]:
    """The folder of the model, and the file of a checkpoint that lies on the hub."""
    what = request.model
    try:
        folder = Path(what)
        if not request.from_folder:
            folder = Path(
                snapshot_download(
                    what, revision=request.revision, allow_patterns=list(WANTED), local_files_only=offline
                )
            )
        if hub_checkpoint is None:
            return folder, None
        what = hub_checkpoint
        repository, file = hub_checkpoint.split(":", 1)
        return folder, hf_hub_download(repository, file, local_files_only=offline)
    except GatedRepoError as error:
        raise Refusal(
            f"the hub gives {what} only to users who accepted its licence: do so on its page, then `hf auth login`; "
            "nearest: --model FOLDER"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
        if isinstance(error.__cause__, OSError) or type(error).__name__ == "LocalEntryNotFoundError":
            raise _unreachable(what) from error
        raise Refusal(
            f"the hub has no {what}, or does not show it to you (`hf auth login`); nearest: {FLUX_DEV}"
        ) from error
    except OSError as error:
        raise _unreachable(what) from error


def _is_underway(fetching: Future[tuple[Path, str | None]] | None) -> bool:
    """Whether there is more to fetch, a moment later; raises what fetching raised."""
    if fetching is None:
        return False
    wait([fetching], SECONDS_BETWEEN_WORDS)
    if not fetching.done():
        return True
    fetching.result()
    return False


def _unreachable(what: str) -> RuntimeError:
    return RuntimeError(
        f"cannot get {what} from the hub: check the network and `hf auth login`, or pass local files "
        "(--model FOLDER, --clear-weights FILE)"
    )
