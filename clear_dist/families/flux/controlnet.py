"""FLUX's ControlNets on the transformer's stripes: the same blocks and exchanges; what they put out stays cut.

A ControlNet adds a tensor of all tokens to each block of the transformer. On stripes it computes those of its own rows,
with keys and values of its own that travel as the transformer's do, and the transformer takes them as they are.

Shapes: B batch, R my rows, W columns, C channels, P patch size of a hint.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clear_dist.comm.group import Group
from clear_dist.engine.cut import Cut
from clear_dist.engine.settings import Settings
from clear_dist.engine.striped import StripedModel
from clear_dist.families.flux.transformer import FluxAdaptor, own_tokens
from clear_dist.geometry import TextPlan
from clear_dist.options import Window

CONTROLNETS = ("FluxControlNetModel", "FluxMultiControlNetModel")


def controlnets_of(pipe: Any) -> list[Any]:
    """The ControlNets of a pipeline, each once; none where it has none.

    Raises:
        ValueError: one of them is of another class.
    """
    controlnet = getattr(pipe, "controlnet", None)
    nets = [] if controlnet is None else list(getattr(controlnet, "nets", [controlnet]))
    for net in nets:
        if type(net).__name__ != CONTROLNETS[0]:
            raise ValueError(f"the ControlNet must be one of {', '.join(CONTROLNETS)}, got {type(net).__name__}")
    return list(dict.fromkeys(nets))


@dataclass(frozen=True)
class FluxControlNetAdaptor(FluxAdaptor):
    """Cuts the inputs of FluxControlNetModel.forward to this rank's rows."""

    def cut(self, inputs: dict[str, Any], cut: Cut, text: TextPlan) -> dict[str, Any]:
        """As a transformer's, with the condition [B, H x W, C]; pixels are cut behind the network that reads them."""
        condition = inputs["controlnet_cond"]
        if self.transformer.input_hint_block is None:
            condition = own_tokens("controlnet_cond", condition, cut)
        return {**super().cut(inputs, cut, text), "controlnet_cond": condition}

    def replicated(self, inputs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        drawn, encoded = super().replicated(inputs)
        mode, scale = inputs.get("controlnet_mode"), torch.tensor(float(inputs.get("conditioning_scale", 1.0)))
        return [*drawn, inputs["controlnet_cond"], scale, *([] if mode is None else [mode])], encoded


class StripedControlNet(StripedModel):
    """A ControlNet on stripes."""

    def __init__(self, adaptor: FluxControlNetAdaptor, scheduler: Any, group: Group, settings: Settings) -> None:
        """As a StripedModel's."""
        super().__init__(adaptor, scheduler, group, settings)
        hint_block = adaptor.transformer.input_hint_block
        if hint_block is not None:
            self._hooks.append(hint_block.register_forward_hook(self._cut_hint))

    def _cut_hint(self, block: nn.Module, args: tuple[Any, ...], hint_BCHW: Tensor) -> Tensor:
        """My rows [B, C, R x P, W x P] of what was computed from the pixels of the whole picture."""
        cut, patch = self._running_cut, self.adaptor.transformer.config.patch_size
        expected, got = (cut.height * patch, cut.width * patch), tuple(hint_BCHW.shape[2:])
        if got != expected:
            raise ValueError(f"the control image must give {expected} features, as many as the latents, got {got}")
        return hint_BCHW[:, :, cut.plan.own.start * patch : cut.plan.own.stop * patch]

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Nothing is joined: the transformer's stripes are the same."""
        self._end_forward()
        return output


def stripe_controlnet(
    net: Any, scheduler: Any, group: Group, settings: Settings, *, window: Window
) -> StripedControlNet:
    """Puts a ControlNet on the transformer's stripes; its text tokens are reduced fully where it sees all.

    Args:
        settings: the transformer's. Down-sampled keys and shares of the text are for it alone: CLEAR's weights are, and
            a ControlNet may put a token of its own before the text.
        window: the ControlNet's.

    Raises:
        ValueError: the backend cannot compute its attention, or a setting does not go with its layers.
    """
    adaptor = FluxControlNetAdaptor(net)
    choose_backend = partial(settings.choose_backend, dtype=net.dtype, head_dim=adaptor.head_dim)
    choose_backend()
    text_attention = "exact" if window == "full" else settings.options.text_attention
    options = replace(settings.options, window=window, text_attention=text_attention, text_tokens="replicated")
    own = replace(settings, options=options, choose_backend=choose_backend, pooling=None)
    return StripedControlNet(adaptor, scheduler, group, own)
