"""A model family as the engine sees it, and the engine as a family's processors, blocks and hooks see it.

The engine cuts a forward's inputs, joins its output and runs joint attention between; differences between models are
methods here. Some need none:

- The order of text and image: `engine/heads.py` lays both out, each is filled by name.
- Rotary or absolute positions: `cut` gives each rank those of its rows, or a hook does where they are added.
- Blocks with text and image apart: all ranks compute text alone by the stock processor; the image alone exchanges halos
  (`Heads` with `alone=True`; with `own_text=True` where a few tokens that all ranks hold go with it).
- Classifier-free guidance as a batch of two: a larger batch.

Shapes: B batch, T text tokens, L tokens of one rank, C channels, N heads, D head dim.
"""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from clear_dist.comm.halo_exchange import PendingHalos
from clear_dist.engine.cut import Cut
from clear_dist.engine.extrapolation import Extrapolation
from clear_dist.engine.parts import Parts
from clear_dist.engine.refiner import Below, Keep
from clear_dist.geometry import TextPlan
from clear_dist.stages import Size, Stage

Inputs = dict[str, Any]
"""Arguments of a transformer's forward, by name."""


class Removable(Protocol):
    def remove(self) -> None: ...


class Stripes(Protocol):
    """The engine as seen from inside a transformer's forward."""

    @property
    def running_cut(self) -> Cut: ...
    @property
    def text_plan(self) -> TextPlan: ...
    @property
    def parts(self) -> Parts: ...
    def start_text(self, layer: int, *qkv_BLND: Tensor) -> None: ...
    def start_halos(
        self, layer: int, key_BLND: Tensor, value_BLND: Tensor, *, alone: bool = False, own_text: bool = False
    ) -> PendingHalos: ...
    def attend(
        self,
        layer: int,
        halos: PendingHalos,
        query_BLND: Tensor,
        key_BLND: Tensor,
        value_BLND: Tensor,
        *,
        alone: bool = False,
        own_text: bool = False,
        out_BLND: Tensor | None = None,
    ) -> Tensor: ...


@runtime_checkable
class StripeProcessor(Protocol):
    striped: Stripes
    layer: int
    """Index among the attention layers on stripes, in the order of calls."""


class Modulated(Protocol):
    """A model's AdaLN modulation, for `--hoist-modulation`."""

    @property
    def embedder(self) -> Any:
        """Module whose output [B, C] is all that the norms of `modulated` are conditioned on."""

    @property
    def modulated(self) -> Mapping[str, Any]:
        """Norms whose `linear` takes silu of the embedding, by name; empty where nothing can be hoisted."""

    def embedder_inputs(self, inputs: tuple[Tensor, ...], timestep: Tensor) -> tuple[Tensor, ...]:
        """The embedder's inputs at another timestep of the schedule, rounded as pipeline and forward round it."""


class Modulation(Protocol):
    """Modulation in host memory (`weights/hoisted.py`)."""

    @property
    def weights(self) -> AbstractSet[Tensor]:
        """Weights that are not on the device."""

    def begin(self, turn: int, scheduler: Any, *, generation: bool) -> None: ...
    def forget(self) -> None: ...
    def undo(self) -> None: ...


class Family(Modulated, Protocol):
    """One transformer, or ControlNet, of a family."""

    @property
    def transformer(self) -> Any: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def channels(self) -> int:
        """Channels of a token's key, all heads together."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Blocks in the order of calls."""

    @property
    def products(self) -> Sequence[str]:
        """Names of the blocks' linear layers that all tokens go through."""

    @property
    def per_picture(self) -> Sequence[str]:
        """Inputs with an entry per picture, where guidance is a batch of two; none: it takes two passes."""

    def processors(self, striped: Stripes) -> Mapping[str, StripeProcessor]:
        """Processors of attention layers that see the image, by layer name, in the order of calls."""

    def hooks(self, striped: Stripes) -> Sequence[Removable]:
        """Other changes of the model, such as blocks of another class."""

    def named_inputs(self, args: tuple[Any, ...], kwargs: Inputs) -> Inputs: ...

    def empty_inputs(self, size: tuple[int, int], *, images: int, text_tokens: int) -> Inputs:
        """Inputs without values of a forward for `size` tokens, on the transformer's device: what a plan asks for."""

    def generation(self, inputs: Inputs) -> object:
        """An object made once per generation and passed to all its forwards; None: the scheduler's timesteps."""

    def latents(self, inputs: Inputs) -> Tensor:
        """Latents [B, ...], an object made once per step for all its passes."""

    def grid_of(self, inputs: Inputs) -> tuple[int, int]:
        """Height and width in tokens; may wait for the GPU. Raises ValueError where the image is no grid."""

    def text_tokens(self, inputs: Inputs) -> int: ...

    def text_mask(self, inputs: Inputs) -> Tensor | None:
        """True [B, T] for text tokens, False for padding; None: no text is padding."""

    def replicated(self, inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs that must be equal on all ranks: to the bit, and up to the rounding of text encoders."""

    def cut(self, inputs: Inputs, cut: Cut, text: TextPlan) -> Inputs:
        """Inputs of this rank: its stripe of the image (`Cut.own_tokens`, `own_patches`), its text, their positions."""

    def adapted(self, pipe: Any) -> "PipelineAdapter": ...

    def joined(self, output: Any, cut: Cut) -> Any:
        """Output for the whole image, by `joined_tokens` or `joined_rows`; as it is where stripes are taken on."""

    def extrapolated(self, extrapolation: Extrapolation) -> AbstractContextManager[None]:
        """Context in which positions are those of a model above its native size."""


class ShiftingFamily(Family, Protocol):
    """A family whose pictures can be cut in patches half a token off."""

    def shifted(self, inputs: Inputs, size: tuple[int, int]) -> Inputs:
        """Inputs of `size` tokens, with a ring of zeros one latent wide around the picture: a token more each way."""


class OnStep(Protocol):
    """Callback after each denoising step: the number of steps done, and the latents as the pipeline returns them.

    The latents that it returns, if any, take their place.
    """

    def __call__(self, pipe: Any, stage: Stage, done: int, latents: Tensor) -> Tensor | None: ...


Others = tuple[int, int]
"""Pictures of a batch that other ranks draw: before these ones, and after."""
Encoded = list[Tensor | None]
"""Embeddings with a row per text; half as many tensors as `PipelineAdapter.arguments`."""


class PipelineAdapter(Protocol):
    """How a family's pipeline draws; all but `encode` and `too_long` need the pipeline on stripes."""

    arguments: tuple[str, ...]
    """The pipeline's arguments for embeddings of prompts, then for those of negative prompts."""

    starts_from_pictures: bool
    """Whether a first stage can start from a picture, and keep what is under a mask."""

    @property
    def token_size(self) -> int:
        """Pixels along the side of a token."""

    @property
    def native_size(self) -> int:
        """Side in pixels of the square that the model was trained on."""

    @property
    def has_yarn(self) -> bool:
        """Whether positions go on above the native size by themselves."""

    def encode(self, texts: list[str], max_sequence_length: int) -> Encoded: ...

    def too_long(self, prompt: str, max_sequence_length: int) -> list[str]:
        """A line per text encoder that does not see all of the prompt."""

    def refining(self, stage: Stage, below: Below | None = None) -> Any:
        """An image-to-image pipeline of the same parts for stages like this; raises ValueError where it lacks one."""

    def keeping(self, pipe: Any, stage: Stage, keep: Keep) -> Any:
        """The pipeline to draw the stage with in place of `pipe`, whose steps `keep` is told of; raises ValueError."""

    def denoise(
        self,
        pipe: Any,
        embeddings: Mapping[str, Tensor],
        stage: Stage,
        *,
        seed: int,
        others: Others = (0, 0),
        start: Tensor | None = None,
        mask: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Latents as the pipeline returns them, equal on all ranks; raises RuntimeError on all unless they are finite.

        `pipe` is the pipeline, or `refining(stage)` with a start: latents from `from_vae`; `seed` of a CPU generator.
        `others`: how many pictures of the batch other ranks draw, whose noise comes before, and after.
        `mask`, [1, 1, H, W] in the start's layout, is 0 where the start stays, 1 where it is drawn anew.
        """

    def unpacked(self, latents: Tensor, rows: slice, size: Size) -> Tensor:
        """Rows of tokens [B, C, R, W] in the VAE's layout, for pictures of `size` pixels."""

    def for_vae(self, latents_BCRW: Tensor) -> Tensor:
        """Latents for the decoder."""

    def from_vae(self, mean_BCHW: Tensor) -> Tensor:
        """Latents for image-to-image, from the means of the VAE's encoder."""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A control picture at a stage's size, equal on all ranks that draw the stage."""

    picture: Tensor
    """Pixels from -1 to 1 [1, 3, H, W], or what the VAE's encoder returns, means first [1, 2 * C, H, W]."""
    scale: float
    mode: int | None


@runtime_checkable
class ReferringAdapter(PipelineAdapter, Protocol):
    """How a pipeline draws that looks at pictures."""

    def referring(self, pictures: Sequence[Any]) -> "PipelineAdapter":
        """The adapter that draws while looking at these, PIL's, equal on all ranks."""


@runtime_checkable
class ControlledAdapter(PipelineAdapter, Protocol):
    """How a pipeline with ControlNets draws."""

    @property
    def reads_pixels(self) -> bool:
        """Whether its ControlNets read control pictures as they are, not encoded by the VAE."""

    def check(self, modes: Sequence[int | None]) -> None:
        """Raises ValueError where control pictures with these modes are not what the ControlNets take."""

    def controlled(self, conditions: Sequence[Condition]) -> "PipelineAdapter":
        """The adapter that draws with these conditions."""


class Sample(Protocol):
    """A tiny random pipeline of a family, for `clear-dist verify`."""

    name: str
    steps: int
    text_shape: tuple[int, ...]
    """Text queries of the real model in one layer: batch, tokens, heads, head dim."""

    def pipeline(self, device: torch.device, dtype: torch.dtype) -> Any:
        """Transformer and scheduler; equal weights in every process."""

    def draw(self, pipe: Any, grid: tuple[int, int]) -> Tensor:
        """Latents of `grid` tokens, from fixed noise."""
