"""Z-Image: where to cut and join, positions in the whole image, and its attention processors.

Two blocks refine the image alone, two the text alone (which all ranks compute), thirty see both. An image whose tokens
are no multiple of 32 is padded with tokens that everybody sees: on stripes they are text, whole on every rank in the
blocks of the image alone, and before the caption in the others.
"""

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF, ZSingleStreamAttnProcessor
from torch import Tensor, nn

from clear_dist.engine.cut import Cut, joined_rows
from clear_dist.engine.extrapolation import Extrapolation
from clear_dist.engine.family import Inputs, Removable, Stripes
from clear_dist.engine.reclassed import Reclassed
from clear_dist.engine.stock import attention_layers, others
from clear_dist.families.z_image.attention import Turns, ZImageStripeAttnProcessor
from clear_dist.families.z_image.blocks import STRIPED
from clear_dist.families.z_image.card import PACKING, check_positions
from clear_dist.families.z_image.pipeline import ZImagePipelineAdapter
from clear_dist.families.z_image.sequence import ScaledRope, Sequencing, padding
from clear_dist.geometry import TextPlan

PRODUCTS = re.compile(
    r"(layers|noise_refiner|context_refiner)\.\d+\.(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123])"
)
OTHER_INPUTS = {
    "controlnet_block_samples": "ControlNets of Z-Image",
    "siglip_feats": "reference pictures (Z-Image Omni)",
    "image_noise_mask": "reference pictures (Z-Image Omni)",
}
"""Arguments of the forward that stripes do not know, and what they come from."""


@dataclass(frozen=True)
class ZImage:
    """A ZImageTransformer2DModel, its inputs cut to this rank's rows and its output joined."""

    transformer: Any
    turns: Turns = field(default_factory=Turns, compare=False)

    @property
    def per_picture(self) -> tuple[str, ...]:
        return ("x", "t", "cap_feats")

    @property
    def head_dim(self) -> int:
        return self.channels // self.transformer.config.n_heads

    @property
    def channels(self) -> int:
        return self.transformer.config.dim

    @property
    def products(self) -> list[str]:
        return [name for name, _ in self.transformer.named_modules() if PRODUCTS.fullmatch(name)]

    @property
    def blocks(self) -> list[nn.Module]:
        model = self.transformer
        return [*model.noise_refiner, *model.context_refiner, *model.layers]

    def processors(self, striped: Stripes) -> dict[str, ZImageStripeAttnProcessor]:
        """Those that see the caption count first, as CLEAR's spatial weights do; ValueError for others' processors."""
        model = self.transformer
        joint, alone = len(model.layers), len(model.noise_refiner)
        numbers = {f"noise_refiner.{index}.attention": joint + index for index in range(alone)}
        numbers |= {f"layers.{index}.attention": index for index in range(joint)}
        for name, layer in attention_layers(model).items():
            if type(layer.processor) is not ZSingleStreamAttnProcessor:
                got = others(layer.processor)
                raise ValueError(f"the processor of {name} must be {ZSingleStreamAttnProcessor.__name__}, got {got}")
        return {
            name: ZImageStripeAttnProcessor(striped, layer, self.turns, sees_caption=layer < joint)
            for name, layer in numbers.items()
        }

    def hooks(self, striped: Stripes) -> Sequence[Removable]:
        model = self.transformer
        seeing = [*model.noise_refiner, *model.layers]
        return [Sequencing(model, striped), *(Reclassed.of(block, STRIPED) for block in seeing)]

    @property
    def embedder(self) -> nn.Module:
        return self.transformer.t_embedder

    @property
    def modulated(self) -> dict[str, Any]:
        """None: all blocks' modulation is 2 % of the weights."""
        return {}

    def embedder_inputs(self, inputs: tuple[Tensor, ...], timestep: Tensor) -> tuple[Tensor, ...]:
        raise AssertionError("no modulation is hoisted")

    def named_inputs(self, args: tuple[Any, ...], kwargs: Inputs) -> Inputs:
        """The latents as one tensor [B, C, 1, H, W]; raises ValueError for what stripes do not know."""
        inputs = dict(inspect.signature(self.transformer.forward).bind(*args, **kwargs).arguments)
        for name, what in OTHER_INPUTS.items():
            if inputs.get(name) is not None:
                raise ValueError(f"{what} cannot be combined with parallelize, got `{name}`; leave them out")
        latents = inputs["x"]
        if not isinstance(latents, Tensor):
            if len({getattr(x, "shape", None) for x in latents}) > 1 or not isinstance(latents[0], Tensor):
                raise ValueError("on stripes all pictures of a forward must be single and of one size")
            inputs["x"] = torch.stack(list(latents))
        return inputs

    def empty_inputs(self, size: tuple[int, int], *, images: int, text_tokens: int) -> Inputs:
        config, like = self.transformer.config, next(self.transformer.parameters())
        height, width = (PACKING * side for side in size)
        return {
            "x": like.new_empty(images, config.in_channels, 1, height, width),
            "t": like.new_empty(images),
            "cap_feats": [like.new_empty(text_tokens, config.cap_feat_dim) for _ in range(images)],
        }

    def generation(self, inputs: Inputs) -> None:
        """None: a caller may pass the same embeddings again."""

    def latents(self, inputs: Inputs) -> Tensor:
        return inputs["x"]

    def grid_of(self, inputs: Inputs) -> tuple[int, int]:
        """Raises ValueError for several frames, or a side beyond the table of positions."""
        _, _, frames, height, width = inputs["x"].shape
        if frames != 1:
            raise ValueError(f"on stripes a picture has one frame, got {frames}")
        size = height // PACKING, width // PACKING
        check_positions(size, self.transformer.config.axes_lens)
        return size

    def text_tokens(self, inputs: Inputs) -> int:
        """Padding of the image, and of each caption to the longest one's multiple of 32."""
        return padding(*self.grid_of(inputs)) + max(padded_lengths(inputs))

    def text_mask(self, inputs: Inputs) -> Tensor | None:
        lengths = padded_lengths(inputs)
        if len(set(lengths)) == 1:
            return None
        device, pads = inputs["x"].device, padding(*self.grid_of(inputs))
        places = torch.arange(pads + max(lengths), device=device)
        return places < pads + torch.tensor(lengths, device=device)[:, None]

    def replicated(self, inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
        lora_scale = (inputs.get("joint_attention_kwargs") or {}).get("scale", 1.0)
        lengths = torch.tensor([len(caption) for caption in inputs["cap_feats"]])
        drawn = [inputs["x"], inputs["t"], lengths, torch.full((), float(lora_scale))]
        return drawn, [torch.cat(list(inputs["cap_feats"]))]

    def cut(self, inputs: Inputs, cut: Cut, text: TextPlan) -> Inputs:
        """Inputs with the latents' rows cut; `Sequencing` cuts the text, once it is refined.

        Raises ValueError where the size is not the one that the generation began with.
        """
        if (found := self.grid_of(inputs)) != cut.size:
            raise ValueError(f"a generation has pictures of one size, {cut.size} tokens, got {found}")
        self.turns.forget(alike=len(set(padded_lengths(inputs))) == 1)
        return {**inputs, "x": list(cut.own_patches(inputs["x"], PACKING).unbind())}

    def adapted(self, pipe: Any) -> ZImagePipelineAdapter:
        return ZImagePipelineAdapter(pipe)

    def joined(self, output: Any, cut: Cut) -> Any:
        """Output of the forward's own type: a tuple or an object, of a list of pictures [C, 1, H, W]."""
        whole = joined_rows(torch.stack(list(output[0])).squeeze(2), cut, PACKING)
        pictures = list(whole.unsqueeze(2).unbind())
        return (pictures, *output[1:]) if isinstance(output, tuple) else Transformer2DModelOutput(sample=pictures)

    @contextmanager
    def extrapolated(self, extrapolation: Extrapolation) -> Iterator[None]:
        """Context in which rows and columns turn as `extrapolation` says; places in the caption stay."""
        stock = self.transformer.rope_embedder
        self.transformer.rope_embedder = ScaledRope(stock, extrapolation)
        try:
            yield
        finally:
            self.transformer.rope_embedder = stock


def padded_lengths(inputs: Inputs) -> list[int]:
    """Tokens of each caption, its own padding included."""
    return [len(caption) + -len(caption) % SEQ_MULTI_OF for caption in inputs["cap_feats"]]
