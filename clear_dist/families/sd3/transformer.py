"""SD3: where to cut and join, and its attention processor. The transformer itself stays diffusers'."""

import inspect
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from clear_dist.engine.cut import Cut, joined_rows
from clear_dist.engine.extrapolation import Extrapolation
from clear_dist.engine.family import Inputs, Removable, Stripes
from clear_dist.engine.reclassed import Reclassed
from clear_dist.engine.stock import attention_layers, others
from clear_dist.families.sd3.attention import SD3StripeAttnProcessor, Still
from clear_dist.families.sd3.blocks import STRIPED
from clear_dist.families.sd3.card import PACKING
from clear_dist.families.sd3.pipeline import SD3PipelineAdapter
from clear_dist.families.sd3.positions import StripePositions
from clear_dist.geometry import TextPlan

PRODUCTS = re.compile(
    r"transformer_blocks\.\d+\."
    r"(attn2?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2))"
)
NORMS = re.compile(r"transformer_blocks\.\d+\.norm1(_context)?|norm_out")


@dataclass(frozen=True)
class SD3:
    """An SD3Transformer2DModel, its inputs cut to this rank's rows and its output joined."""

    transformer: Any

    @property
    def per_picture(self) -> tuple[str, ...]:
        return ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")

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
        return list(self.transformer.transformer_blocks)

    def processors(self, striped: Stripes) -> dict[str, SD3StripeAttnProcessor]:
        """Joint layers are counted first, as CLEAR's spatial weights are; raises ValueError for others' processors."""
        layers = attention_layers(self.transformer)
        for name, layer in layers.items():
            if type(layer.processor) is not JointAttnProcessor2_0:
                raise ValueError(
                    f"the processor of {name} must be JointAttnProcessor2_0, got {others(layer.processor)}"
                )
        counted = sorted(layers, key=lambda name: name.endswith("attn2"))
        numbers, still = {name: number for number, name in enumerate(counted)}, Still()
        return {name: SD3StripeAttnProcessor(striped, numbers[name], still) for name in layers}

    def hooks(self, striped: Stripes) -> Sequence[Removable]:
        """All blocks, their class changed until `remove`, and the positions."""
        positions = StripePositions(self.transformer.pos_embed, striped)
        return [positions, *(Reclassed.of(block, STRIPED) for block in self.blocks)]

    @property
    def embedder(self) -> nn.Module:
        """Embedder of timestep and pooled prompt."""
        return self.transformer.time_text_embed

    @property
    def modulated(self) -> dict[str, Any]:
        return {name: norm for name, norm in self.transformer.named_modules() if NORMS.fullmatch(name)}

    def embedder_inputs(self, inputs: tuple[Tensor, ...], timestep: Tensor) -> tuple[Tensor, ...]:
        return (timestep.to(inputs[0]).expand(inputs[0].shape), *inputs[1:])

    def grid_of(self, inputs: Inputs) -> tuple[int, int]:
        height, width = inputs["hidden_states"].shape[2:]
        if height % PACKING or width % PACKING:
            raise ValueError(f"latents must have sides that are multiples of {PACKING}, got {height} x {width}")
        return height // PACKING, width // PACKING

    def text_tokens(self, inputs: Inputs) -> int:
        return inputs["encoder_hidden_states"].shape[1]

    def cut(self, inputs: Inputs, cut: Cut, text: TextPlan) -> Inputs:
        """Inputs with rows of latents, and the text where it is shared; raises ValueError for what has no stripes."""
        if inputs.get("block_controlnet_hidden_states") is not None:
            raise ValueError("SD3's ControlNets cannot be parallelised; leave out block_controlnet_hidden_states")
        if "ip_adapter_image_embeds" in (inputs.get("joint_attention_kwargs") or {}):
            raise ValueError("IP-Adapters cannot be combined with clear_dist.parallelize; undo() it first")
        if inputs.get("skip_layers") and cut.stale:
            raise ValueError("skip_guidance_layers needs the sync schedule, got stale; nearest: schedule='sync'")
        return {
            **inputs,
            "hidden_states": cut.own_patches(inputs["hidden_states"], PACKING),
            "encoder_hidden_states": inputs["encoder_hidden_states"][:, text.own],
        }

    def extrapolated(self, extrapolation: Extrapolation) -> AbstractContextManager[None]:
        """No change: positions are made for each cut, which knows what is extrapolated."""
        return nullcontext()

    def replicated(self, inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
        lora_scale = (inputs.get("joint_attention_kwargs") or {}).get("scale", 1.0)
        drawn = [inputs["hidden_states"], inputs["timestep"], torch.full((), float(lora_scale))]
        return drawn, [inputs["encoder_hidden_states"], inputs["pooled_projections"]]

    def empty_inputs(self, size: tuple[int, int], *, images: int, text_tokens: int) -> Inputs:
        config, like = self.transformer.config, next(self.transformer.parameters())
        return {
            "hidden_states": like.new_empty(images, config.in_channels, PACKING * size[0], PACKING * size[1]),
            "encoder_hidden_states": like.new_empty(images, text_tokens, config.joint_attention_dim),
            "pooled_projections": like.new_empty(images, config.pooled_projection_dim),
            "timestep": like.new_empty(images, dtype=torch.float32),
        }

    def named_inputs(self, args: tuple[Any, ...], kwargs: Inputs) -> Inputs:
        return dict(inspect.signature(self.transformer.forward).bind(*args, **kwargs).arguments)

    def generation(self, inputs: Inputs) -> None:
        """None: without guidance, embeddings may be the user's own, and the next generation's too."""

    def latents(self, inputs: Inputs) -> Tensor:
        return inputs["hidden_states"]

    def text_mask(self, inputs: Inputs) -> None:
        """None: padded text is seen, as in stock SD3."""

    def adapted(self, pipe: Any) -> SD3PipelineAdapter:
        return SD3PipelineAdapter(pipe)

    def joined(self, output: Any, cut: Cut) -> Any:
        """Output of the forward's own type: a tuple or an object."""
        if isinstance(output, tuple):
            return joined_rows(output[0], cut, PACKING), *output[1:]
        return Transformer2DModelOutput(sample=joined_rows(output.sample, cut, PACKING))
