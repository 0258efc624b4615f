"""What a model family answers the engine, and what its processors, blocks and hooks may ask of it.

A family is a folder under `families/`. The engine cuts a forward's inputs, joins its output and runs joint attention
between; all that differs from model to model is a method here. Some differences need no method:

- The order of text and image in a model's own sequence: `engine/heads.py` lays both out, each is filled by name.
- Rotary or absolute positions: `cut` gives each rank those of its rows, or a hook does where they are added.
- Blocks in which text and image are apart: text alone is computed by all ranks alike, by the stock processor; the image
  alone exchanges halos too (`Heads` with `alone=True`).
- Classifier-free guidance as a batch of two: the engine sees a larger batch.

Shapes: B batch, T text tokens, L tokens of one rank, C channels, N heads, D head dim.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from clear_dist.comm.halo_exchange import PendingHalos
from clear_dist.engine.cut import Cut
from clear_dist.engine.extrapolation import Extrapolation
from clear_dist.engine.parts import Parts
from clear_dist.geometry import TextPlan
from clear_dist.stages import Size, Stage

Inputs = dict[str, Any]
"""Arguments of a transformer's forward, by name."""


class Removable(Protocol):
    """A hook, or what else is put on a model for a while."""

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
    def start_halos(self, layer: int, key_BLND: Tensor, value_BLND: Tensor, *, alone: bool = False) -> PendingHalos: ...
    def attend(
        self,
        layer: int,
        halos: PendingHalos,
        query_BLND: Tensor,
        key_BLND: Tensor,
        value_BLND: Tensor,
        *,
        alone: bool = False,
    ) -> Tensor: ...


@runtime_checkable
class StripeProcessor(Protocol):
    """An attention processor of ours."""

    striped: Stripes
    layer: int
    """Number of its attention layer among those on stripes, in the order of calls."""


class Modulated(Protocol):
    """A model's AdaLN modulation, for `--hoist-modulation`."""

    @property
    def embedder(self) -> Any:
        """Module whose output, [B, C], is all that the norms of `modulated` see."""

    @property
    def modulated(self) -> Mapping[str, Any]:
        """Norms whose `linear` takes silu of the embedding, by name; none: nothing can be hoisted."""

    def embedder_inputs(self, inputs: tuple[Tensor, ...], timestep: Tensor) -> tuple[Tensor, ...]:
        """The embedder's inputs at another timestep of the schedule, rounded as pipeline and forward round it."""


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
        """Blocks in the order of calls: what is sharded and quantised."""

    @property
    def products(self) -> Sequence[str]:
        """Names of the linear layers in blocks that all tokens go through: what is quantised."""

    def processors(self, striped: Stripes) -> Mapping[str, StripeProcessor]:
        """Processors for attention layers that see the image, by the layers' names, in the order of calls."""

    def hooks(self, striped: Stripes) -> Sequence[Removable]:
        """What else is put on the model, blocks of other classes among it."""

    def named_inputs(self, args: tuple[Any, ...], kwargs: Inputs) -> Inputs: ...

    def generation(self, inputs: Inputs) -> object:
        """The object that a pipeline makes once for each generation, and passes to all forwards of it."""

    def latents(self, inputs: Inputs) -> Tensor:
        """The latents [B, ...]: an object that a pipeline makes once for each step, for all passes of it."""

    def grid_of(self, inputs: Inputs) -> tuple[int, int]:
        """Height and width of the image in tokens; may wait for the GPU. Raises ValueError where it is no grid."""

    def text_tokens(self, inputs: Inputs) -> int: ...

    def text_mask(self, inputs: Inputs) -> Tensor | None:
        """True [B, T] where a text token is no padding; None: all are seen."""

    def replicated(self, inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs that must be equal on all ranks: to the bit, and up to the rounding of text encoders."""

    def cut(self, inputs: Inputs, cut: Cut, text: TextPlan) -> Inputs:
        """The inputs of this rank: its rows of the image, its share of the text, positions of the whole image."""

    def adapted(self, pipe: Any) -> "PipelineAdapter":
        """How a pipeline with this transformer draws."""

    def joined(self, output: Any, cut: Cut) -> Any:
        """The forward's output for all rows, by `cut.join`; as it is where what follows takes stripes."""

    def extrapolated(self, extrapolation: Extrapolation) -> AbstractContextManager[None]:
        """While inside, positions are those of a model above its native size."""


class OnStep(Protocol):
    """Called after each denoising step with the number of steps done and the latents, as the pipeline returns them."""

    def __call__(self, pipe: Any, stage: Stage, done: int, latents: Tensor) -> None: ...


Encoded = list[Tensor | None]
"""Embeddings of texts, a row for each; as many tensors as half of `PipelineAdapter.arguments`."""


class PipelineAdapter(Protocol):
    """How a family's pipeline draws; all but `encode` and `too_long` need the pipeline on stripes."""

    arguments: tuple[str, ...]
    """The pipeline's arguments for embeddings: those of prompts, then as many of negative prompts."""

    @property
    def token_size(self) -> int:
        """Pixels along the side of a token."""

    @property
    def native_size(self) -> int:
        """Side in pixels of the square that the model was trained on."""

    def encode(self, texts: list[str], max_sequence_length: int) -> Encoded: ...

    def too_long(self, prompt: str, max_sequence_length: int) -> list[str]:
        """A line for each text encoder that does not see all of the prompt."""

    def refining(self) -> Any:
        """An image-to-image pipeline of the same parts; raises ValueError where it would leave one out."""

    def denoise(
        self,
        pipe: Any,
        embeddings: Mapping[str, Tensor],
        stage: Stage,
        *,
        seed: int,
        start: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Latents as the pipeline returns them, equal on all ranks.

        Args:
            pipe: the pipeline, or `refining()` where there is a start.
            seed: of a CPU generator.
            start: what `from_vae` returned for the picture that is to be refined; None: noise.

        Raises:
            RuntimeError: the latents are not finite: on all ranks, which hold the same.
        """

    def unpacked(self, latents: Tensor, rows: slice, size: Size) -> Tensor:
        """Rows of tokens of the latents, [B, C, R, W] in the VAE's layout; `size` is the picture's in pixels."""

    def for_vae(self, latents_BCRW: Tensor) -> Tensor:
        """Latents as the VAE's decoder takes them."""

    def from_vae(self, mean_BCHW: Tensor) -> Tensor:
        """Latents for image-to-image, from the means that the VAE's encoder gives."""


class Sample(Protocol):
    """A tiny random pipeline of a family, for `clear-dist verify`."""

    name: str
    """The family's, for people."""
    steps: int
    """Denoising steps of a drawing."""
    text_shape: tuple[int, ...]
    """Text queries of the real model in one layer: batch, tokens, heads, head dim."""

    def pipeline(self, device: torch.device, dtype: torch.dtype) -> Any:
        """Transformer and scheduler; equal weights in every process."""

    def draw(self, pipe: Any, grid: tuple[int, int]) -> Tensor:
        """Latents of an image of `grid` tokens, always from the same noise."""
