"""FLUX.2: where to cut and join, and its attention processors. The transformer itself stays diffusers'."""

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux2 import Flux2PosEmbed, Flux2Transformer2DModelOutput
from torch import Tensor, nn

from clear_dist.engine.cut import Cut
from clear_dist.engine.extrapolation import Extrapolation
from clear_dist.engine.family import Inputs, Removable, StripeProcessor, Stripes
from clear_dist.engine.reclassed import Reclassed
from clear_dist.engine.references import References, after_references, flat_ids, joined_image, own_ids
from clear_dist.engine.rotary import cosines_and_sines
from clear_dist.engine.stock import attention_layers
from clear_dist.families.flux.attention import FluxStripeAttnProcessor
from clear_dist.families.flux2.attention import Flux2ParallelStripeProcessor
from clear_dist.families.flux2.blocks import STRIPED
from clear_dist.families.flux2.card import MODULATION, ROPE_AXES
from clear_dist.families.flux2.pipeline import Flux2PipelineAdapter
from clear_dist.geometry import TextPlan

PRODUCTS = re.compile(
    r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.linear_(in|out))|"
    r"single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
)
CACHED = ("kv_cache", "kv_cache_mode")


@dataclass(frozen=True)
class Flux2:
    """A Flux2Transformer2DModel, its inputs cut to this rank's rows and its output joined."""

    transformer: Any
    references: References = field(default_factory=References, compare=False)

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

    def processors(self, striped: Stripes) -> dict[str, StripeProcessor]:
        return {
            name: (Flux2ParallelStripeProcessor if hasattr(attn, "to_qkv_mlp_proj") else FluxStripeAttnProcessor)(
                striped, number
            )
            for number, (name, attn) in enumerate(attention_layers(self.transformer).items())
        }

    def hooks(self, striped: Stripes) -> Sequence[Removable]:
        """All blocks, their class changed until `remove`."""
        return [Reclassed.of(block, STRIPED) for block in self.blocks]

    @property
    def embedder(self) -> nn.Module:
        """Embedder of timestep and guidance."""
        return self.transformer.time_guidance_embed

    @property
    def modulated(self) -> dict[str, Any]:
        return {name: self.transformer.get_submodule(name) for name in (*MODULATION, "norm_out")}

    def embedder_inputs(self, inputs: tuple[Tensor, ...], timestep: Tensor) -> tuple[Tensor, ...]:
        like = inputs[0]
        scaled = timestep.expand(like.shape).to(like.dtype) / 1000
        return (scaled.to(like.device) * 1000, *inputs[1:])

    def grid_of(self, inputs: Inputs) -> tuple[int, int]:
        """Height and width of the picture from `img_ids` (waits for the GPU); raises as `References.grid`."""
        if any(inputs.get(name) is not None for name in CACHED):
            raise ValueError("cached keys of reference images (Flux2KleinKVPipeline) cannot be parallelised")
        return self.references.grid(flat_ids(inputs["img_ids"]))

    def text_tokens(self, inputs: Inputs) -> int:
        """Tokens of the text, and of reference images, which are treated alike."""
        references = self.references.count(inputs["hidden_states"].shape[1])
        return inputs["encoder_hidden_states"].shape[1] + references

    def cut(self, inputs: Inputs, cut: Cut, text: TextPlan) -> Inputs:
        """Inputs with the image's tokens and ids cut, and the text's where it is shared."""
        hidden = inputs["hidden_states"]
        references = self.references.own(cut, text, inputs["encoder_hidden_states"].shape[1])
        ids = own_ids(cut, inputs["img_ids"].device, axes=len(ROPE_AXES))
        return {
            **inputs,
            "hidden_states": after_references(hidden[:, references], cut.own_tokens(hidden), 1),
            "encoder_hidden_states": inputs["encoder_hidden_states"][:, text.own],
            "img_ids": after_references(flat_ids(inputs["img_ids"])[references].float(), ids, 0),
            "txt_ids": flat_ids(inputs["txt_ids"])[text.own].float(),
        }

    @contextmanager
    def extrapolated(self, extrapolation: Extrapolation) -> Iterator[None]:
        """Context in which the rotary embedding's base is `ntk_factor` times the stock one's."""
        stock = self.transformer.pos_embed
        # Another module, not a hook on the stock one: a compiled transformer does not look for new hooks.
        plain = Flux2PosEmbed(theta=stock.theta * extrapolation.ntk_factor, axes_dim=stock.axes_dim)
        clipped = ClippedPosEmbed(stock, extrapolation)
        self.transformer.pos_embed = clipped if extrapolation.least_frequency else plain
        try:
            yield
        finally:
            self.transformer.pos_embed = stock

    def replicated(self, inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
        drawn = [inputs[name] for name in ("hidden_states", "timestep", "guidance") if inputs.get(name) is not None]
        lora_scale = (inputs.get("joint_attention_kwargs") or {}).get("scale", 1.0)
        return [*drawn, torch.full((), float(lora_scale))], [inputs["encoder_hidden_states"]]

    def empty_inputs(self, size: tuple[int, int], *, images: int, text_tokens: int) -> Inputs:
        config, tokens = self.transformer.config, size[0] * size[1]
        like = next(self.transformer.parameters())
        inputs = {
            "hidden_states": like.new_empty(images, tokens, config.in_channels),
            "encoder_hidden_states": like.new_empty(images, text_tokens, config.joint_attention_dim),
            "timestep": like.new_empty(images),
            "img_ids": like.new_empty(tokens, len(ROPE_AXES)),
            "txt_ids": like.new_empty(text_tokens, len(ROPE_AXES)),
        }
        guidance = like.new_empty(images, dtype=torch.float32)
        return inputs | ({"guidance": guidance} if config.guidance_embeds else {})

    def named_inputs(self, args: tuple[Any, ...], kwargs: Inputs) -> Inputs:
        return dict(inspect.signature(self.transformer.forward).bind(*args, **kwargs).arguments)

    def generation(self, inputs: Inputs) -> None:
        """None: with reference images the ids are made anew in each step."""

    def latents(self, inputs: Inputs) -> Tensor:
        return inputs["hidden_states"]

    def text_mask(self, inputs: Inputs) -> None:
        """None: padded text is seen, as in stock FLUX.2."""

    def adapted(self, pipe: Any) -> Flux2PipelineAdapter:
        return Flux2PipelineAdapter(pipe)

    def joined(self, output: Any, cut: Cut) -> Any:
        """Output of the forward's own type: a tuple or an object."""
        if isinstance(output, tuple):
            return joined_image(output[0], cut), *output[1:]
        return Flux2Transformer2DModelOutput(sample=joined_image(output.sample, cut))


class ClippedPosEmbed(Flux2PosEmbed):
    """Above the native size, with a bound for low frequencies."""

    def __init__(self, stock: Flux2PosEmbed, beyond: Extrapolation) -> None:
        super().__init__(theta=stock.theta, axes_dim=stock.axes_dim)
        self._beyond = beyond

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return cosines_and_sines(ids, self.axes_dim, self.theta, self._beyond)
