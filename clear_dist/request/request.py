"""A checked request, with everything chosen."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from clear_dist.request.flags import Kept
from clear_dist.stages import Sampling, Size, Stage, Upscaling, plan_cascade, plan_upscaling

PROFILE_ENDINGS = (".json", ".json.gz")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A user's picture that is to be made larger."""

    file: Path
    box: tuple[int, int, int, int]
    """What is used of it: left, top, right and bottom in pixels; the target's shape."""

    @property
    def size(self) -> Size:
        """Height and width of what is used."""
        left, top, right, bottom = self.box
        return bottom - top, right - left


@dataclass(frozen=True, kw_only=True)
class Lora:
    """One LoRA."""

    source: str
    """A file, or a hub file as `owner/name:file`."""
    weight: float = 1.0

    def without_folders(self) -> "Lora":
        """Named so that others may read it: no folders of this machine."""
        return replace(self, source=Path(self.source).name) if os.path.exists(self.source) else self


@dataclass(frozen=True, kw_only=True)
class Request(Kept):
    """A checked request with everything chosen that can be known before the model is loaded.

    None: the loaded model decides (a hub model's native size and window), or rank 0 draws it (the seed).
    """

    prompts: tuple[str, ...]
    negative_prompt: str | None
    num_images: int
    """Of each prompt."""
    picture: Picture | None
    """What to start from; None: noise."""
    model: str
    """A folder, or a hub id."""
    model_name: str
    """As the picture's metadata tell it: no folders of this machine."""
    clear_weights: str | None
    """A file, or a hub file as `owner/name:file` or `owner/name@revision:file`."""
    loras: tuple[Lora, ...]
    height: int | None
    """Pixels, as width."""
    width: int | None
    native_size: int | None
    token_size: int
    """Pixels along the side of a token."""
    down_factor: int = 1
    """So many tokens are a side of what one down-sampled key stands for; 1: there are no such keys."""
    cascade: bool
    sampling: Sampling
    upscaling: Upscaling
    max_sequence_length: int
    dtype: str
    device: str
    world_size: int

    @property
    def from_folder(self) -> bool:
        return os.path.isdir(self.model)

    @property
    def unit(self) -> int:
        """Pixels that all sides are multiples of."""
        return self.token_size * self.down_factor

    @property
    def size(self) -> Size:
        """Height and width in pixels."""
        assert self.height is not None and self.width is not None, "known once the model is located"
        return self.height, self.width

    @property
    def traces(self) -> tuple[Path, ...]:
        """What is written for `profile`, in the order of ranks."""
        if self.profile is None:
            return ()
        name = self.profile.name
        ending = next(name[-len(ending) :] for ending in PROFILE_ENDINGS if name.lower().endswith(ending))
        name = name.removesuffix(ending)
        return tuple(self.profile.with_name(f"{name}.rank{rank}{ending}") for rank in range(self.world_size))

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The last one has the size that was asked for."""
        native = self.base_res or self.native_size
        assert native is not None, "known once the model is located"
        if self.picture is not None:
            return plan_upscaling(
                self.picture.size, self.size, native=native, token=self.unit, upscaling=self.upscaling
            )
        return plan_cascade(
            self.size,
            native=native,
            token=self.unit,
            sampling=self.sampling,
            upscaling=self.upscaling,
            cascade=self.cascade,
        )
