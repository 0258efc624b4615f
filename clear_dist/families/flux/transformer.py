"""FLUX: where to cut and join, and its attention processor. The transformer itself stays diffusers'."""

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn
from torch.nn.functional import pad

from clear_dist.engine.cut import Cut
from clear_dist.engine.extrapolation import Extrapolation
from clear_dist.engine.family import Inputs, Removable, Stripes
from clear_dist.engine.reclassed import Reclassed
from clear_dist.engine.references import References, after_references, flat_ids, joined_image
from clear_dist.engine.stock import attention_layers
from clear_dist.engine.text_copies import Place
from clear_dist.families.flux.attention import Adaptive, FluxStripeAttnProcessor
from clear_dist.families.flux.blocks import STRIPED, WITH_YARN
from clear_dist.families.flux.card import is_yarn
from clear_dist.families.flux.controlled import FluxControlNetAdapter
from clear_dist.families.flux.pipeline import FluxPipelineAdapter
from clear_dist.families.flux.positions import ClippedPosEmbed, Positions, StripedPosEmbed
from clear_dist.geometry import TextPlan

PRODUCTS = re.compile(
    r"(single_)?transformer_blocks\.\d+\."
    r"(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out)"
)
NORMS = re.compile(r"transformer_blocks\.\d+\.norm1(_context)?|single_transformer_blocks\.\d+\.norm|norm_out")


@dataclass(frozen=True)
class Flux:
    """A FluxTransformer2DModel, its inputs cut to this rank's rows and its output joined."""

    transformer: Any
    adaptive: Adaptive = field(default_factory=Adaptive, compare=False)
    references: References = field(default_factory=References, compare=False)
    positions: Positions = field(default_factory=Positions, compare=False)

    @property
    def has_yarn(self) -> bool:
        return is_yarn(self.transformer.config)

    @property
    def per_picture(self) -> tuple[str, ...]:
        return ()

    @property
    def head_dim(self) -> int:
        return self.transformer.config.attention_head_dim

    @property
    def channels(self) -> int:
        return self.head_dim * self.transformer.config.num_attention_heads

    @property
    def products(self) -> list[str]:
        return [name for name, _ in self.transformer.named_modules() if PRODUCTS.fullmatch(name)]

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]

    def processors(self, striped: Stripes) -> dict[str, FluxStripeAttnProcessor]:
        names = attention_layers(self.transformer)
        return {name: FluxStripeAttnProcessor(striped, layer, self.adaptive) for layer, name in enumerate(names)}

    def hooks(self, striped: Stripes) -> Sequence[Removable]:
        """All blocks and the rotary embedding, their class changed until `remove`."""
        classes = WITH_YARN if self.has_yarn else STRIPED
        return [Reclassed.of(module, classes) for module in (*self.blocks, self.transformer.pos_embed)]

    @property
    def embedder(self) -> nn.Module:
        """Embedder of timestep, guidance and pooled prompt."""
        return self.transformer.time_text_embed

    @property
    def modulated(self) -> dict[str, Any]:
        return {name: norm for name, norm in self.transformer.named_modules() if NORMS.fullmatch(name)}

    def embedder_inputs(self, inputs: tuple[Tensor, ...], timestep: Tensor) -> tuple[Tensor, ...]:
        like = inputs[0]
        scaled = timestep.expand(like.shape).to(like.dtype) / 1000
        return (scaled.to(like.device) * 1000, *inputs[1:])

    def grid_of(self, inputs: Inputs) -> tuple[int, int]:
        """Height and width of the picture from `img_ids` (waits for the GPU); raises as `References.grid`."""
        return self.references.grid(flat_ids(inputs["img_ids"]))

    def text_tokens(self, inputs: Inputs) -> int:
        """Tokens of the text, and of reference images (Kontext), which are treated alike."""
        references = self.references.count(inputs["hidden_states"].shape[1])
        return inputs["encoder_hidden_states"].shape[1] + references

    def cut(self, inputs: Inputs, cut: Cut, text: TextPlan) -> Inputs:
        """Inputs with the image's tokens, ids and ControlNet residuals cut, and the text's where it is shared."""
        self.adaptive.forget()
        hidden = inputs["hidden_states"]
        residuals = {
            name: [own_tokens(name, sample, cut) for sample in inputs[name]]
            for name in ("controlnet_block_samples", "controlnet_single_block_samples")
            if inputs.get(name) is not None
        }
        references = self.references.own(cut, text, inputs["encoder_hidden_states"].shape[1])
        has_references = hidden.shape[1] > cut.height * cut.width
        if residuals and has_references:
            raise ValueError("ControlNets cannot be combined with reference images on stripes; leave out either")
        if self.has_yarn and (residuals or has_references):
            raise ValueError("a model with YaRN takes a picture alone on stripes; leave out ControlNets and references")
        reference_ids = flat_ids(inputs["img_ids"])[references]
        text_ids, ids = self.positions(self.transformer.pos_embed, inputs["txt_ids"], text.own, cut, reference_ids)
        return {
            **inputs,
            **residuals,
            "hidden_states": after_references(hidden[:, references], cut.own_tokens(hidden), 1),
            "encoder_hidden_states": inputs["encoder_hidden_states"][:, text.own],
            "img_ids": ids,
            "txt_ids": text_ids,
        }

    @contextmanager
    def extrapolated(self, extrapolation: Extrapolation) -> Iterator[None]:
        """Context in which the rotary embedding's base is `ntk_factor` times the stock one's; YaRN's stays."""
        stock = self.transformer.pos_embed
        if self.has_yarn:
            yield
            return
        # Another module, not a hook on the stock one: a compiled transformer does not look for new hooks.
        plain = StripedPosEmbed(theta=stock.theta * extrapolation.ntk_factor, axes_dim=stock.axes_dim)
        clipped = ClippedPosEmbed(stock, extrapolation)
        self.transformer.pos_embed = clipped if extrapolation.least_frequency else plain
        try:
            yield
        finally:
            self.transformer.pos_embed = stock

    def shifted(self, inputs: Inputs, size: tuple[int, int]) -> Inputs:
        side = FluxPipelineAdapter.packing
        patches = inputs["hidden_states"].unflatten(1, size).unflatten(-1, (-1, side, side))
        latents_BCHW = patches.permute(0, 3, 1, 4, 2, 5).flatten(-2).flatten(2, 3)
        patches = pad(latents_BCHW, (side // 2,) * 4).unflatten(-1, (-1, side)).unflatten(2, (-1, side))
        return {**inputs, "hidden_states": patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)}

    def copied(self, inputs: Inputs, places: Sequence[Place]) -> Inputs:
        ids, text_BTC = flat_ids(inputs["txt_ids"]).float(), inputs["encoder_hidden_states"]
        moved = [ids + ids.new_tensor((0, *place)) for place in places]
        return {**inputs, "encoder_hidden_states": text_BTC.repeat(1, len(places), 1), "txt_ids": torch.cat(moved)}

    def replicated(self, inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
        drawn = [inputs[name] for name in ("hidden_states", "timestep", "guidance") if inputs.get(name) is not None]
        lora_scale = (inputs.get("joint_attention_kwargs") or {}).get("scale", 1.0)
        return [*drawn, torch.full((), float(lora_scale))], [
            inputs["encoder_hidden_states"],
            inputs["pooled_projections"],
        ]

    def empty_inputs(self, size: tuple[int, int], *, images: int, text_tokens: int) -> Inputs:
        config, tokens = self.transformer.config, size[0] * size[1]
        like = next(self.transformer.parameters())
        inputs = {
            "hidden_states": like.new_empty(images, tokens, config.in_channels),
            "encoder_hidden_states": like.new_empty(images, text_tokens, config.joint_attention_dim),
            "pooled_projections": like.new_empty(images, config.pooled_projection_dim),
            "timestep": like.new_empty(images),
            "img_ids": like.new_empty(tokens, 3),
            "txt_ids": like.new_empty(text_tokens, 3),
        }
        guidance = like.new_empty(images, dtype=torch.float32)
        return inputs | ({"guidance": guidance} if config.guidance_embeds else {})

    def named_inputs(self, args: tuple[Any, ...], kwargs: Inputs) -> Inputs:
        return dict(inspect.signature(self.transformer.forward).bind(*args, **kwargs).arguments)

    def generation(self, inputs: Inputs) -> object:
        return inputs["img_ids"]

    def latents(self, inputs: Inputs) -> Tensor:
        return inputs["hidden_states"]

    def text_mask(self, inputs: Inputs) -> None:
        """None: padded text is seen, as in stock FLUX."""

    def adapted(self, pipe: Any) -> FluxPipelineAdapter:
        has_controlnet = getattr(pipe, "controlnet", None) is not None
        return FluxControlNetAdapter(pipe) if has_controlnet else FluxPipelineAdapter(pipe)

    def joined(self, output: Any, cut: Cut) -> Any:
        """Output of the forward's own type: a tuple or an object."""
        if isinstance(output, tuple):
            return joined_image(output[0], cut), *output[1:]
        return Transformer2DModelOutput(sample=joined_image(output.sample, cut))


def own_tokens(name: str, x_BLC: Tensor, cut: Cut) -> Tensor:
    """My tokens of the input `name`, whole or cut already by a ControlNet on stripes; raises ValueError for others."""
    own, whole = len(cut.plan.own) * cut.width, cut.height * cut.width
    if x_BLC.shape[1] not in (own, whole):
        raise ValueError(f"`{name}` must have a token for each of the {whole} latents, got {x_BLC.shape[1]}")
    return x_BLC if x_BLC.shape[1] == own else cut.own_tokens(x_BLC)
