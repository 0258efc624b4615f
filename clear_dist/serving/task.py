"""What all ranks are told of pictures to draw: JSON, read back into checked records, and never a pickle."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from clear_dist.stages import ImageToImage, Sampling, Stage, Upscaling

KINDS: Mapping[str, type[Sampling]] = {kind.__name__: kind for kind in (Sampling, ImageToImage, Upscaling)}

Start = Literal["noise", "picture", "looks"]
"""What pictures begin with; one that is looked at is no beginning."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Pictures of one size that are drawn together; text and pictures to start from are with rank 0."""

    stages: tuple[Stage, ...]
    seeds: tuple[int, ...]
    """Of each request's noise."""
    images: tuple[int, ...]
    """Pictures of each request."""
    loras: tuple[tuple[str, float], ...] = ()
    """Names of files in the server's folder, and their weights."""
    start: Start = "noise"
    has_mask: bool = False

    def to_json(self) -> str:
        stages = [
            asdict(stage) | {"sampling": asdict(stage.sampling), "kind": type(stage.sampling).__name__}
            for stage in self.stages
        ]
        return json.dumps(vars(self) | {"stages": stages})

    @classmethod
    def of_json(cls, text: str) -> "Task":
        """The inverse; raises ValueError, KeyError or TypeError for what is no task."""
        fields = json.loads(text)
        return cls(
            stages=tuple(map(_stage, fields["stages"])),
            seeds=tuple(fields["seeds"]),
            images=tuple(fields["images"]),
            loras=tuple((str(name), float(weight)) for name, weight in fields["loras"]),
            start=fields["start"],
            has_mask=fields["has_mask"],
        )


def _stage(fields: dict[str, Any]) -> Stage:
    sampling = KINDS[fields.pop("kind")](**fields.pop("sampling"))
    return Stage(**fields | {"sampling": sampling, "resting": tuple(fields["resting"])})
