"""FLUX's ControlNets on the transformer's stripes: the same blocks and exchanges; outputs stay cut.

A ControlNet adds a tensor of all tokens to each block; on stripes each rank computes and adds its own rows.

Shapes: B batch, R my rows, W columns, C channels, P patch size of a hint.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clear_dist.engine.cut import Cut
from clear_dist.engine.family import Inputs, Removable, Stripes
from clear_dist.families.flux.transformer import Flux, own_tokens
from clear_dist.geometry import TextPlan

SCALE = 8
"""Pixels along a side of what the network that reads them makes of them."""


@dataclass(frozen=True)
class FluxControlNet(Flux):
    """A FluxControlNetModel, its inputs cut to this rank's rows."""

    def cut(self, inputs: Inputs, cut: Cut, text: TextPlan) -> Inputs:
        """Transformer inputs, with the condition [B, H x W, C]; pixels are cut after the network that reads them."""
        condition = inputs["controlnet_cond"]
        if self.transformer.input_hint_block is None:
            condition = own_tokens("controlnet_cond", condition, cut)
        return {**super().cut(inputs, cut, text), "controlnet_cond": condition}

    def replicated(self, inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
        drawn, encoded = super().replicated(inputs)
        mode, scale = inputs.get("controlnet_mode"), torch.tensor(float(inputs.get("conditioning_scale", 1.0)))
        return [*drawn, inputs["controlnet_cond"], scale, *([] if mode is None else [mode])], encoded

    def empty_inputs(self, size: tuple[int, int], *, images: int, text_tokens: int) -> Inputs:
        inputs = super().empty_inputs(size, images=images, text_tokens=text_tokens)
        like, config = inputs["hidden_states"], self.transformer.config
        condition = like
        if self.transformer.input_hint_block is not None:
            condition = like.new_empty(images, 3, *(SCALE * config.patch_size * side for side in size))
        mode = {} if config.num_mode is None else {"controlnet_mode": like.new_empty(images, 1, dtype=torch.long)}
        # As pipelines call it: diffusers' object for the results has no room for blocks of one kind alone.
        return {**inputs, "controlnet_cond": condition, "return_dict": False, **mode}

    def hooks(self, striped: Stripes) -> Sequence[Removable]:
        hint_block = self.transformer.input_hint_block
        if hint_block is None:
            return super().hooks(striped)
        return [*super().hooks(striped), hint_block.register_forward_hook(partial(self._cut_hint, striped))]

    def joined(self, output: Any, cut: Cut) -> Any:
        """Output as it is: the transformer's stripes are the same."""
        return output

    def _cut_hint(self, striped: Stripes, block: nn.Module, args: tuple[Any, ...], hint_BCHW: Tensor) -> Tensor:
        """My rows [B, C, R x P, W x P] of the features of the whole picture, patches intact."""
        cut, patch = striped.running_cut, self.transformer.config.patch_size
        expected, got = tuple(side * patch for side in cut.size), tuple(hint_BCHW.shape[2:])
        if got != expected:
            raise ValueError(f"the control image must give {expected} features, as many as the latents, got {got}")
        return cut.own_patches(hint_BCHW, patch)
