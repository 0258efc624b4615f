"""FLUX: what to cut, where to join, and its attention processor. The transformer itself stays diffusers'."""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from torch import Tensor, nn

from clear_dist.models.cut import Cut
from clear_dist.models.extrapolation import Extrapolation
from clear_dist.models.flux_blocks import Rotary, StripedBlock, require_no_mask
from clear_dist.models.striped import StripedModel

PRODUCTS = re.compile(
    r"(single_)?transformer_blocks\.\d+\."
    r"(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out)"
)


class FluxStripeAttnProcessor:
    """Projects, normalises and rotates as diffusers' FluxAttnProcessor, then attends over stripes.

    A block on stripes takes from it which layer it is (`flux_blocks.py`). It is called where others have put a forward
    of their own on a block before: hooks that bring its weights, mostly.
    """

    def __init__(self, striped: StripedModel, layer: int) -> None:
        self.striped = striped
        self.layer = layer

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Double blocks pass the text apart and get two outputs; single blocks pass both joined, text first.

        Raises:
            ValueError: an attention mask is given; windows and stripes have no place for it.
        """
        require_no_mask(attention_mask)
        assert image_rotary_emb is not None, "FLUX rotates in every layer"
        positions = slice(-hidden_states.shape[1], None)
        rotary = image_rotary_emb[0][positions], image_rotary_emb[1][positions]
        key = apply_rotary_emb(attn.norm_k(heads(attn, attn.to_k, hidden_states)), rotary, sequence_dim=1)
        value = heads(attn, attn.to_v, hidden_states)
        halos = self.striped.start_halos(self.layer, key, value)
        query = attn.norm_q(heads(attn, attn.to_q, hidden_states))
        if encoder_hidden_states is None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            return self.striped.joint_attention(self.layer, halos, query, key, value).flatten(2)
        text_tokens = encoder_hidden_states.shape[1]
        query_text = attn.norm_added_q(heads(attn, attn.add_q_proj, encoder_hidden_states))
        key_text = attn.norm_added_k(heads(attn, attn.add_k_proj, encoder_hidden_states))
        value_text = heads(attn, attn.add_v_proj, encoder_hidden_states)
        text_positions = image_rotary_emb[0][:text_tokens], image_rotary_emb[1][:text_tokens]
        output = self.striped.joint_attention(
            self.layer,
            halos,
            apply_rotary_emb(torch.cat([query_text, query], dim=1), image_rotary_emb, sequence_dim=1),
            torch.cat([apply_rotary_emb(key_text, text_positions, sequence_dim=1), key], dim=1),
            torch.cat([value_text, value], dim=1),
        ).flatten(2)
        image = attn.to_out[1](attn.to_out[0](output[:, text_tokens:]))
        return image, attn.to_add_out(output[:, :text_tokens])


def heads(attn: Any, linear: nn.Module, x: Tensor) -> Tensor:
    """`x` [B, L, C] projected, [B, L, N, D]."""
    return linear(x).unflatten(-1, (-1, attn.head_dim))


@dataclass(frozen=True)
class FluxAdaptor:
    """Cuts the inputs of FluxTransformer2DModel.forward to this rank's rows and joins its output."""

    transformer: Any
    """A FluxTransformer2DModel."""

    @property
    def head_dim(self) -> int:
        return self.transformer.config.attention_head_dim

    @property
    def channels(self) -> int:
        """Of a token's key."""
        return self.head_dim * self.transformer.config.num_attention_heads

    @property
    def products(self) -> list[str]:
        """Names of the linear layers that all tokens go through in blocks."""
        return [name for name, _ in self.transformer.named_modules() if PRODUCTS.fullmatch(name)]

    def processors(self, striped: StripedModel) -> dict[str, FluxStripeAttnProcessor]:
        names = self.transformer.attn_processors
        return {name: FluxStripeAttnProcessor(striped, layer) for layer, name in enumerate(names)}

    def striped_blocks(self) -> list[StripedBlock]:
        """All blocks, their class changed until `remove`."""
        return [
            StripedBlock.of(block)
            for block in (*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks)
        ]

    @property
    def embedder(self) -> nn.Module:
        """Of timestep, guidance and pooled prompt; every norm of `modulated` is given what it puts out, and no more."""
        return self.transformer.time_text_embed

    @property
    def modulated(self) -> dict[str, Any]:
        """The norms whose `linear` takes silu of the embedding, by name."""
        blocks, singles = self.transformer.transformer_blocks, self.transformer.single_transformer_blocks
        names = [f"transformer_blocks.{i}.{norm}" for i in range(len(blocks)) for norm in ("norm1", "norm1_context")]
        names += [f"single_transformer_blocks.{i}.norm" for i in range(len(singles))]
        return {name: self.transformer.get_submodule(name) for name in (*names, "norm_out")}

    def embedder_inputs(self, inputs: tuple[Tensor, ...], timestep: Tensor) -> tuple[Tensor, ...]:
        """The embedder's inputs at another timestep of the schedule, rounded as pipelines and the forward round it."""
        like = inputs[0]
        scaled = timestep.expand(like.shape).to(like.dtype) / 1000
        return (scaled.to(like.device) * 1000, *inputs[1:])

    def grid_of(self, inputs: dict[str, Any]) -> tuple[int, int]:
        """Height and width in tokens, read from `img_ids` (this waits for the GPU: once per generation).

        Raises:
            ValueError: the ids are not one image in raster order (FLUX.1 Kontext's reference images, for one).
        """
        ids = flat_ids(inputs["img_ids"])
        width = int((ids[:, 1] == 0).sum())
        height = len(ids) // max(width, 1)
        if len(ids) != height * width or not torch.equal(raster_ids(height, width, ids.device).to(ids.dtype), ids):
            raise ValueError(
                f"`img_ids` must be those of one image in raster order, got {len(ids)} ids that are not; "
                "pipelines that append tokens of other images cannot be parallelised"
            )
        return height, width

    def text_tokens(self, inputs: dict[str, Any]) -> int:
        """Their number."""
        return inputs["encoder_hidden_states"].shape[1]

    def cut(self, inputs: dict[str, Any], cut: Cut) -> dict[str, Any]:
        """The inputs with the image's tokens, ids and ControlNet residuals cut; the text's stay whole.

        Ids are made anew in float32: pipelines cast them to the prompt's dtype, and bfloat16 has no 257.
        """
        mine = cut.tokens
        residuals = {
            name: [sample[:, mine] for sample in inputs[name]]
            for name in ("controlnet_block_samples", "controlnet_single_block_samples")
            if inputs.get(name) is not None
        }
        ids = raster_ids(cut.height, cut.width, inputs["img_ids"].device)[mine]
        if cut.extrapolation is not None:
            ids = ids * cut.extrapolation.position_scale
        return {
            **inputs,
            **residuals,
            "hidden_states": inputs["hidden_states"][:, mine].contiguous(),
            "img_ids": ids,
            "txt_ids": flat_ids(inputs["txt_ids"]).float(),
        }

    @contextmanager
    def extrapolated(self, extrapolation: Extrapolation) -> Iterator[None]:
        """While inside, the rotary embedding's base is `ntk_factor` times the stock one's."""
        stock = self.transformer.pos_embed
        # Another module, not a hook on the stock one: a compiled transformer does not look for new hooks.
        self.transformer.pos_embed = FluxPosEmbed(theta=stock.theta * extrapolation.ntk_factor, axes_dim=stock.axes_dim)
        try:
            yield
        finally:
            self.transformer.pos_embed = stock

    def replicated(self, inputs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        """The inputs that must be equal on all ranks: to the bit, and but for the rounding of text encoders."""
        drawn = [inputs[name] for name in ("hidden_states", "timestep", "guidance") if inputs.get(name) is not None]
        return drawn, [inputs["encoder_hidden_states"], inputs["pooled_projections"]]

    def named_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return dict(inspect.signature(self.transformer.forward).bind(*args, **kwargs).arguments)

    def with_sample(self, output: Any, sample: Tensor) -> Any:
        """The forward's output, a tuple or an object, with another sample in it."""
        return (sample, *output[1:]) if isinstance(output, tuple) else Transformer2DModelOutput(sample=sample)


def flat_ids(ids: Tensor) -> Tensor:
    """Ids [tokens, 3]; a leading batch dimension is deprecated in diffusers, but taken."""
    return ids[0] if ids.ndim == 3 else ids


def raster_ids(height: int, width: int, device: torch.device) -> Tensor:
    """Position ids (0, y, x) of a grid in raster order, float32 [height x width, 3]."""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    zeros = torch.zeros(height, width, device=device)
    return torch.stack([zeros, *torch.meshgrid(rows.float(), columns.float(), indexing="ij")], dim=-1).flatten(0, 1)
