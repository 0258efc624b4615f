"""Pictures of one prompt on disk, with their settings as metadata."""

import json
import shlex
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clear_dist import __version__
from clear_dist.comm.group import Group
from clear_dist.drawing.drawn import Drawing
from clear_dist.drawing.generation import picture_rows
from clear_dist.drawing.many import alike
from clear_dist.pictures import keeps_alpha, save_picture, stage_file
from clear_dist.pictures.alpha import Alpha
from clear_dist.pictures.decoding import written_metadata
from clear_dist.request.request import Request

NOT_TO_BE_SHARED = (
    "prompts", "negative_prompt", "output", "latents_out", "report", "profile", "pictures", "files", "join_timeout",
    "quiet", "resume", "checkpoint_every", "keep_going", "lines",
)  # fmt: skip
"""Settings of other prompts, files of this machine, and what leaves the picture as it is."""


@dataclass(frozen=True, kw_only=True)
class Saving:
    """Called alike on every rank for each prompt; rank 0 writes, row by row as stripes arrive."""

    request: Request
    """This prompt's picture alone, where there is one."""
    prompt: str
    settings: Mapping[str, Any]
    seed: int
    group: Group
    files: Sequence[Path]
    """Names of the last stage's pictures."""
    first: int
    """Number of the first of them among the prompt's."""
    alpha: Alpha | None
    """The start picture's, on rank 0."""
    began: float
    """By `time.perf_counter`."""
    within: Path | None = None
    """Folder for files that are not whole; None: beside the pictures."""

    def save(self, drawing: Drawing, *, last: bool) -> None:
        """Save all pictures of a stage, a lower one's named by size; raises ItemFailed and leaves no part of a file."""
        height, width = drawing.size
        for index, output in enumerate(self.files):
            file = output if last else stage_file(output, height, width)
            rows = picture_rows(drawing, index, self.group)
            with alike(self.group):
                try:
                    if self.group.rank == 0:
                        self._write(rows, file, index, height=height, width=width)
                except OSError:
                    deque(rows, maxlen=0)  # the others still send
                    raise
                deque(rows, maxlen=0)  # sends

    def _write(self, rows: Iterator[Any], file: Path, index: int, *, height: int, width: int) -> None:
        metadata = self._metadata(index) if self.request.metadata else None
        alpha = self.alpha if keeps_alpha(file) else None
        settings: dict[str, Any] = {"metadata": metadata, "alpha": alpha, "within": self.within}
        written = save_picture(rows, file, height=height, width=width, **settings)
        named = zip(("output", "thumbnail"), (shlex.quote(str(each)) for each in written), strict=False)
        figures = f"seed={self.seed} size={width}x{height} ranks={self.group.size}"
        seconds = f"seconds={time.perf_counter() - self.began:.2f}"
        print(*map("=".join, named), figures, seconds, flush=True)

    def is_there(self) -> bool:
        """Whether all pictures of the last stage have been written with this prompt, seed and settings."""
        picture = self.request.picture
        read = [] if picture is None else [each for each in (picture.file, picture.mask) if each is not None]
        for index, file in enumerate(self.files):
            if not file.is_file() or written_metadata(file) != self._metadata(index):
                return False
            if any(source.stat().st_mtime > file.stat().st_mtime for source in read):
                return False
        return True

    def _metadata(self, index: int) -> dict[str, str]:
        """Settings that may be shared: no other prompts, no folders of this machine."""
        settings = {name: value for name, value in self.settings.items() if name not in NOT_TO_BE_SHARED}
        settings["model"] = settings.pop("model_name")
        if settings["clear_weights"] is not None and Path(settings["clear_weights"]).exists():
            settings["clear_weights"] = Path(settings["clear_weights"]).name
        settings["loras"] = [asdict(lora.without_folders()) for lora in self.request.loras]
        if self.request.control is not None:
            control = self.request.control.without_folders()
            settings["control"] = asdict(control) | {"image": None if control.image is None else str(control.image)}
        if (picture := self.request.picture) is not None and self.request.enlarges:
            settings["upscaled_from"] = list(picture.size)
            del settings["sampling"]
        elif picture is not None:
            settings["drawn_from"] = picture.file.name
            settings["mask"] = None if picture.mask is None else picture.mask.name
        own = {
            "prompt": self.prompt,
            "seed": str(self.seed),
            "Software": f"clear-dist {__version__}",
            "image": str(self.first + index),
        }
        if self.request.negative_prompt is not None:
            own["negative_prompt"] = self.request.negative_prompt
        return own | {"settings": json.dumps(settings)}
