"""What is wanted from the hub, and why it is not given."""

import errno
from dataclasses import dataclass

from huggingface_hub.constants import ENDPOINT, HF_HUB_CACHE, HF_HUB_ETAG_TIMEOUT
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from clear_dist.comm.ends import Failure, describe
from clear_dist.config import Refusal

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
NOT_GIVEN = (401, 403)
LOCAL_FILES = "local files (--model FOLDER, --clear-weights FILE, --lora FILE)"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Files of one repository."""

    repository: str
    revision: str | None = None
    """Branch, tag or commit; None: the main branch."""
    patterns: tuple[str, ...]
    needed: str
    """The file without which the others are of no use."""
    nearest: str
    """What to ask for instead."""


def explained(want: Wanted, error: Exception) -> Refusal | Failure:
    """What the hub's library raised, as the line for the user."""
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
    return Failure(
        f"cannot get {repository} from the hub ({cause_of(error)}): check the network and HF_ENDPOINT, or pass "
        f"{LOCAL_FILES}"
    )


def cause_of(error: BaseException) -> str:
    """Why the hub's library has failed, in a few words."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, HfHubHTTPError):
        return error.server_message or f"status {error.response.status_code}"
    if isinstance(error, TimeoutError) and not str(error):
        return f"no answer within {HF_HUB_ETAG_TIMEOUT} s"
    return describe(error)
