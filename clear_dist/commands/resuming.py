"""What `--resume` finds and leaves beside the pictures of a request."""

import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clear_dist import hub
from clear_dist.comm.group import Group
from clear_dist.drawing.checkpoints import NAME, CheckpointFolder
from clear_dist.drawing.many import alike
from clear_dist.drawing.resume import Checkpoints, Unsaved
from clear_dist.geometry import Rows
from clear_dist.launch.ends import say
from clear_dist.options import Refusal
from clear_dist.pictures import replacing
from clear_dist.pictures.decoding import written_metadata
from clear_dist.request.request import Request
from clear_dist.request.resume import REQUEST, described, digest_of_note, folder_of, note, require_same, weights_of
from clear_dist.request.resume_flags import CHECKPOINT_EVERY

SEED_BITS = 32


@dataclass(frozen=True, kw_only=True)
class Resuming:
    """Checkpoints of all pictures of a request; without `--resume` there are none."""

    request: Request
    weights: Mapping[str, str] = field(default_factory=dict)
    seed: int | None = None
    """The run's before, where it is known."""

    @classmethod
    def of(cls, request: Request, everyone: Group) -> "Resuming":
        """All ranks call this; raises a Refusal on all where there are checkpoints of something else."""
        if not request.resume:
            return cls(request=request)
        found: Resuming | Refusal | None = None
        if everyone.rank == 0:
            try:
                found = cls._found(request)
            except Refusal as error:
                found = error
        found = everyone.broadcast_object(found)
        if isinstance(found, Refusal):
            raise found
        assert found is not None, "rank 0 has looked"
        return found

    @classmethod
    def _found(cls, request: Request) -> "Resuming":
        loras = (Path(lora.source) for lora in hub.local_loras(request))
        weights = weights_of(request, loras, hub.local_controlnet(request))
        resuming = cls(request=request, weights=weights)
        seeds = [_written(request)]
        for index, images in _shares(request):
            folder, asked = resuming.folder(index, images), request.alone(index).seed
            assert folder is not None, "there is one for each"
            found = require_same(folder, resuming._described(index, images), asked)
            seeds += [found] if asked is None else []
        return cls(request=request, weights=weights, seed=next((s for s in reversed(seeds) if s is not None), None))

    def chosen_seed(self) -> int:
        """The seed that is asked for, else that of the run before, else one that is drawn."""
        known = (seed for seed in (self.request.seed, self.seed) if seed is not None)
        return next(known, secrets.randbits(SEED_BITS))

    def folder(self, index: int, images: Rows) -> Path | None:
        """Folder of the checkpoints of pictures `images` of prompt `index`; None: none are kept."""
        first = index * self.request.num_images + images.start
        return folder_of(self.request.outputs[first]) if self.request.resume else None

    def checkpoints(self, index: int, images: Rows, seed: int, group: Group) -> Unsaved:
        """Go on from the newest checkpoint, or begin; all ranks of `group` call this."""
        folder = self.folder(index, images)
        if folder is None:
            return Unsaved()
        text = note(seed, self._described(index, images))
        with alike(group):
            if group.rank == 0 and not (folder / REQUEST).exists():
                folder.mkdir(exist_ok=True)
                with replacing(folder / REQUEST) as partial:
                    partial.write_text(text)
        every = self.request.checkpoint_every or CHECKPOINT_EVERY
        found = Checkpoints(CheckpointFolder(folder, digest_of_note(text)), group, every)
        if group.rank == 0 and (found.stage or found.step):
            where = f"after step {found.step} of" if found.step else "with"
            halos = "; its next step is synchronous" if self.request.schedule == "stale" and found.step else ""
            say(f"going on {where} stage {found.stage + 1}, from {folder}{halos}")
        return found

    def end(self, index: int, images: Rows) -> None:
        """Delete what was kept of finished pictures, on one rank."""
        folder = self.folder(index, images)
        if folder is None or not folder.is_dir():
            return
        own = [file for file in folder.iterdir() if NAME.fullmatch(file.name) or file.name.startswith(".")]
        for file in (*own, folder / REQUEST):  # which tells what the others are of
            file.unlink(missing_ok=True)
        with suppress(OSError):  # somebody has put something there
            folder.rmdir()

    def _described(self, index: int, images: Rows) -> dict[str, Any]:
        return described(self.request, index, range(images.start, images.stop), self.weights)


def _shares(request: Request) -> Iterator[tuple[int, Rows]]:
    """Prompts, and the pictures of them that a data group draws."""
    for group in range(request.data_ranks):
        yield from request.drawn_by(group).items()


def _written(request: Request) -> int | None:
    """The seed that a picture of the list was drawn with, if any is there."""
    for index, file in enumerate(request.outputs):
        if request.alone(index // request.num_images).seed is not None:
            continue
        found = (written_metadata(file) if file.is_file() else None) or {}
        if found.get("prompt") == request.prompts[index // request.num_images] and found.get("seed", "").isdecimal():
            return int(found["seed"])
    return None
