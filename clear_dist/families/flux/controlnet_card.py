"""FLUX's ControlNets without torch: all tensors by the numbers of config.json, and those known on the hub."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from clear_dist.cards.clear import Shapes
from clear_dist.cards.controlnets import ControlNets, HubControlNet
from clear_dist.cards.headers import whole_number
from clear_dist.cards.tensors import Tensors, linear
from clear_dist.families.flux.card import FluxShape

NOT_ITS = ("norm_out.", "proj_out.")
"""Tensors of a transformer's end, which a ControlNet has not."""
HINT_CHANNELS, HINT_BLOCKS, PIXELS = 16, 3, 3
MUST_FIT = ("in_channels", "joint_attention_dim", "pooled_projection_dim", "channels")


@dataclass(frozen=True, kw_only=True)
class FluxControlNetShape:
    """Numbers of config.json that decide a ControlNet's tensors."""

    blocks: FluxShape
    modes: int | None = None
    hint_channels: int | None = None
    """Channels of the features of those that read pixels; None: it reads latents."""

    @classmethod
    def of(cls, config: Mapping[str, Any], where: Path | str) -> Self:
        """From the contents of the file `where`; raises a Refusal for wrong numbers. A kind of block may be absent."""
        absent: dict[str, Any] = {name: 0 for name in ("num_layers", "num_single_layers") if config.get(name) == 0}
        blocks = FluxShape.of({**config, **dict.fromkeys(absent, 1)}, where)
        kinds = (("modes", "num_mode"), ("hint_channels", "conditioning_embedding_channels"))
        given = {field: whole_number(config, name, 1, where) for field, name in kinds if config.get(name) is not None}
        return cls(blocks=replace(blocks, **absent), **given)

    def tensors(self) -> Shapes:
        return dict(self._tensors())

    def misfit(self, transformer: FluxShape) -> str | None:
        if transformer.has_yarn:
            return "its positions must be those of YaRN, got FLUX.1's"
        for name in MUST_FIT:
            mine, theirs = getattr(self.blocks, name), getattr(transformer, name)
            if mine != theirs:
                return f"{name} must be {theirs}, got {mine}"
        return None

    def _tensors(self) -> Tensors:
        width = self.blocks.channels
        yield from ((name, shape) for name, shape in self.blocks.tensors().items() if not name.startswith(NOT_ITS))
        yield from linear("controlnet_x_embedder", self.blocks.in_channels, width)
        for index in range(self.blocks.num_layers):
            yield from linear(f"controlnet_blocks.{index}", width, width)
        for index in range(self.blocks.num_single_layers):
            yield from linear(f"controlnet_single_blocks.{index}", width, width)
        if self.modes is not None:
            yield "controlnet_mode_embedder.weight", (self.modes, width)
        if self.hint_channels is not None:
            yield from _convolution("conv_in", PIXELS, HINT_CHANNELS)
            for index in range(2 * HINT_BLOCKS):
                yield from _convolution(f"blocks.{index}", HINT_CHANNELS, HINT_CHANNELS)
            yield from _convolution("conv_out", HINT_CHANNELS, self.hint_channels)


def _convolution(name: str, inputs: int, outputs: int) -> Tensors:
    yield f"input_hint_block.{name}.weight", (outputs, inputs, 3, 3)
    yield f"input_hint_block.{name}.bias", (outputs,)


CONTROLNETS = ControlNets(
    kind="FluxControlNetModel",
    pipeline="FluxControlNetPipeline",
    shape_of=FluxControlNetShape.of,
    modes=("canny", "tile", "depth", "blur", "pose", "gray", "low-quality"),
    on_hub=(
        HubControlNet(
            id="Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro",
            short="union-pro",
            config={"num_layers": 5, "num_single_layers": 10, "guidance_embeds": True, "num_mode": 10},
        ),
        HubControlNet(
            id="Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro-2.0",
            short="union-pro-2",
            config={"num_layers": 6, "num_single_layers": 0, "guidance_embeds": True},
        ),
    ),
)
