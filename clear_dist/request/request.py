"""A checked request, with everything chosen."""

import os
from dataclasses import dataclass, replace
from math import ceil, prod
from pathlib import Path
from typing import Any

from clear_dist.cards.single_file import Files
from clear_dist.geometry import Rows, Striping, cut_in_stripes, most_stripes, stripe_image
from clear_dist.options import Window
from clear_dist.pictures import numbered
from clear_dist.request.flags import Kept
from clear_dist.request.lines import Line
from clear_dist.stages import (
    AtStages,
    ImageToImage,
    Sampling,
    Size,
    Stage,
    Upscaling,
    plan_cascade,
    plan_upscaling,
    with_adapters,
)

PROFILE_ENDINGS = (".json", ".json.gz")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A user's picture to start from; `box` is the part used: left, top, right and bottom in pixels."""

    file: Path
    box: tuple[int, int, int, int]
    target: Size
    output: Path | None = None
    """File that `upscale` writes for this picture; None: the request's."""
    mask: Path | None = None
    """As large as the picture, which stays as it is where this is black."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Below transparent parts."""
    has_alpha: bool = False
    notes: tuple[str, ...] = ()
    """Parts of it that are not used, or cannot be read."""

    @property
    def size(self) -> Size:
        left, top, right, bottom = self.box
        return bottom - top, right - left


@dataclass(frozen=True, kw_only=True)
class Lora:
    """One LoRA; `source` is a file, or a hub file as `owner/name:file`."""

    source: str
    weight: float = 1.0
    stages: AtStages | None = None
    """Stages that it works in; None: all."""

    def without_folders(self) -> "Lora":
        return replace(self, source=Path(self.source).name) if os.path.exists(self.source) else self


def adapter_name(number: int) -> str:
    """Name in the model of a request's LoRA, counted from 0."""
    return f"lora_{number}"


@dataclass(frozen=True, kw_only=True)
class Control:
    """A ControlNet, and what it is shown."""

    source: str
    """A folder, or on the hub `owner/name` or `owner/name@revision`."""
    image: Path | None
    """None: the picture that is enlarged."""
    size: Size | None
    """The image's, in pixels."""
    scale: float
    mode: int | None
    """Kind of control picture, for a union; else None."""
    window: Window

    def without_folders(self) -> "Control":
        source = Path(self.source).name if os.path.isdir(self.source) else self.source
        return replace(self, source=source, image=None if self.image is None else Path(self.image.name))


@dataclass(frozen=True, kw_only=True)
class Request(Kept):
    """A checked request, sizes in pixels, with everything chosen that can be known before loading.

    None: a hub model's files decide (its sizes), or rank 0 draws it (the seed).
    """

    prompts: tuple[str, ...]
    negative_prompt: str | None
    num_images: int
    pictures: tuple[Picture, ...]
    """Pictures to start from, one for each prompt; none: noise."""
    model: str
    model_name: str
    clear_weights: str | None
    """A file, or a hub file as `owner/name:file` or `owner/name@revision:file`."""
    loras: tuple[Lora, ...]
    control: Control | None = None
    lines: tuple[Line, ...] = ()
    """For each prompt, sizes in pixels; none where prompts are all that they have."""
    files: Files
    """Weights that are not in the model's folder."""
    height: int | None
    """Pixels; the largest picture's where there are several."""
    width: int | None
    native_size: int | None
    token_size: int
    down_factor: int = 1
    """Side in tokens of a down-sampled key's area; 1 without such keys."""
    cascade: bool
    sampling: Sampling
    upscaling: Upscaling
    max_sequence_length: int
    dtype: str
    device: str
    world_size: int

    @property
    def ranks(self) -> int:
        """Ranks that draw a picture together."""
        return self.world_size // self.data_ranks

    @property
    def is_guided(self) -> bool:
        """Whether any stage has classifier-free guidance, as far as the stages are known."""
        samplings = [stage.sampling for stage in self.stages] or [self.sampling, self.upscaling]
        return self.negative_prompt is not None and max(each.passes for each in samplings) > 1

    @property
    def images_at_once(self) -> int:
        """Most pictures of a prompt that a data group draws together."""
        return min(self.num_images, ceil(len(self.prompts) * self.num_images / self.data_ranks))

    def drawn_by(self, group: int) -> dict[int, Rows]:
        """The prompts of a data group, and which pictures of each it draws: as many as the others, or one more."""
        images = self.num_images
        mine = cut_in_stripes(len(self.prompts) * images, self.data_ranks)[group]
        of_prompts = {prompt: Rows(prompt * images, (prompt + 1) * images) for prompt in range(len(self.prompts))}
        shares = {prompt: mine.intersect(pictures) for prompt, pictures in of_prompts.items()}
        return {
            prompt: Rows(share.start - prompt * images, share.stop - prompt * images)
            for prompt, share in shares.items()
            if len(share)
        }

    @property
    def from_folder(self) -> bool:
        return os.path.isdir(self.model)

    @property
    def unit(self) -> int:
        """Pixels that every side is a multiple of."""
        return self.token_size * self.down_factor

    @property
    def size(self) -> Size:
        assert self.height is not None and self.width is not None, "known once the model is located"
        return self.height, self.width

    @property
    def picture(self) -> Picture | None:
        """The picture that becomes the largest."""
        return max(self.pictures, key=lambda each: prod(each.target), default=None)

    def most_ranks(self, size: Size) -> int:
        """Most ranks that can draw a picture of `size` pixels."""
        return most_stripes(self._tokens(size), cut=self.cut, unit=self.down_factor)

    def striping(self, size: Size, ranks: int) -> Striping:
        """A picture of `size` pixels on so many ranks; raises ValueError as `stripe_image`."""
        return stripe_image(self._tokens(size), ranks, cut=self.cut, radius=self.radius, unit=self.down_factor)

    def _tokens(self, size: Size) -> tuple[int, int]:
        return size[0] // self.token_size, size[1] // self.token_size

    @property
    def enlarges(self) -> bool:
        """Whether its pictures are made larger."""
        return any(picture.output is not None for picture in self.pictures)

    @property
    def looks(self) -> bool:
        """Whether its pictures are looked at; else the first stage starts from them."""
        return bool(self.pictures) and not self.enlarges and not isinstance(self.sampling, ImageToImage)

    def alone(self, prompt: int) -> "Request":
        """The request of one prompt's picture; this one where all are alike but for their prompts."""
        own: dict[str, Any] = {}
        if self.lines:
            line = self.lines[prompt]
            seed = self.seed if line.seed is None else line.seed
            own |= {"lines": (line,), "negative_prompt": line.negative_prompt, "seed": seed}
            own |= {"output": line.output or self.output, "height": line.height, "width": line.width}
        if self.pictures:
            picture, (height, width) = self.pictures[prompt], self.pictures[prompt].target
            own |= {"pictures": (picture,), "height": height, "width": width}
        return replace(self, prompts=(self.prompts[prompt],), **own) if own else self

    @property
    def differing(self) -> range:
        """Prompts whose requests may differ in more than the prompt."""
        return range(len(self.prompts) if self.pictures or self.lines else 1)

    @property
    def outputs(self) -> tuple[Path, ...]:
        """Names of all pictures, `num_images` for each prompt."""
        if enlarged := tuple(picture.output for picture in self.pictures if picture.output is not None):
            return enlarged
        images, count = self.num_images, len(self.prompts) * self.num_images
        files = [numbered(self.output, index, count) for index in range(count)]
        for index, line in enumerate(self.lines):
            if (named := line.output) is not None:
                own = (numbered(named, image, images) for image in range(images))
                files[index * images : (index + 1) * images] = own
        return tuple(files)

    @property
    def traces(self) -> tuple[Path, ...]:
        """Files of `profile`, by rank."""
        if self.profile is None:
            return ()
        name = self.profile.name
        ending = next(name[-len(ending) :] for ending in PROFILE_ENDINGS if name.lower().endswith(ending))
        name = name.removesuffix(ending)
        return tuple(self.profile.with_name(f"{name}.rank{rank}{ending}") for rank in range(self.world_size))

    @property
    def stages(self) -> tuple[Stage, ...]:
        """None for a hub model of unknown size, until it is located."""
        native = self.base_res or self.native_size
        if native is None or self.height is None:
            return ()
        given: dict[str, Any] = {"native": native, "token": self.unit, "upscaling": self.upscaling}
        if self.enlarges and self.picture is not None:
            stages = plan_upscaling(self.picture.size, self.size, **given)
        else:
            stages = plan_cascade(self.size, sampling=self.sampling, cascade=self.cascade, **given)
        return with_adapters(stages, self._adapters)

    @property
    def _adapters(self) -> dict[str, AtStages]:
        """Stages of the LoRA that are not for all."""
        named = {adapter_name(number): lora.stages for number, lora in enumerate(self.loras)}
        return {name: where for name, where in named.items() if where is not None}
