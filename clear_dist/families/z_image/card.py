"""Z-Image without torch: hub models, parts of folders, and all tensors by the numbers of config.json."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from clear_dist.cards.card import Card, Defaults, HubModel, LoraLayer, TextEncoders
from clear_dist.cards.clear import Shapes
from clear_dist.cards.headers import whole_number, whole_numbers
from clear_dist.cards.tensors import AUTOENCODER_KL, Layers, Tensors, clear_tensors, linear, lora_layers
from clear_dist.options import Refusal, shortened
from clear_dist.stages import Sampling, Upscaling

TURBO, BASE = "Tongyi-MAI/Z-Image-Turbo", "Tongyi-MAI/Z-Image"
PACKING = 2
"""Latents along the side of a token."""
TIME_CHANNELS, TIME_HIDDEN, EMBEDDING = 256, 1024, 256
AXES_DIMS, AXES_LENS = (32, 48, 48), (1024, 512, 512)
"""Channels of a head, and positions, of the caption's place, rows and columns; diffusers' defaults."""
QKV = ("to_q", "to_k", "to_v")
PROJECTIONS = (*QKV, "to_out.0")
BASE_SHIFT = 6.0
"""Shift of Z-Image's schedule; Turbo's, whose other files say the same, is 3."""


@dataclass(frozen=True, kw_only=True)
class ZImageShape:
    """Numbers of config.json that decide the transformer's tensors and largest picture; the defaults are diffusers'."""

    in_channels: int = 16
    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    cap_feat_dim: int = 2560
    axes_lens: tuple[int, ...] = AXES_LENS

    @classmethod
    def of(cls, config: Mapping[str, Any], where: Path | str) -> Self:
        """From the contents of the file `where`; raises a Refusal for wrong numbers, or another kind of Z-Image."""
        names = [name for name in cls.__dataclass_fields__ if name != "axes_lens"]
        numbers = {name: whole_number(config, name, getattr(cls, name), where) for name in names}
        for name, usual in (("all_patch_size", (PACKING,)), ("all_f_patch_size", (1,))):
            if (found := whole_numbers(config, name, usual, where)) != usual:
                raise Refusal(f"{name} must be {list(usual)}, got {shortened(str(list(found)))} in {where}")
        if config.get("siglip_feat_dim") is not None:
            raise Refusal(f"Z-Image Omni, which takes pictures, is not supported, got one in {where}; nearest: {BASE}")
        axes = whole_numbers(config, "axes_dims", AXES_DIMS, where)
        head_dim, rest = divmod(numbers["dim"], numbers["n_heads"])
        if rest or len(axes) != len(AXES_DIMS) or sum(axes) != head_dim or any(axis % 2 for axis in axes):
            raise Refusal(
                f"axes_dims must be three even numbers that sum up to dim / n_heads, {numbers['dim']} / "
                f"{numbers['n_heads']}, got {shortened(str(list(axes)))} in {where}; are the files those of one model?"
            )
        lengths = whole_numbers(config, "axes_lens", AXES_LENS, where)
        if len(lengths) != len(AXES_LENS):
            raise Refusal(f"axes_lens must be three numbers, got {shortened(str(list(lengths)))} in {where}")
        return cls(**numbers, axes_lens=lengths)

    def tensors(self) -> Shapes:
        return dict(self._tensors())

    def clear_tensors(self, down_factor: int = 1) -> Shapes:
        """Attention's projections of all blocks that see the image; pooling weights of those that see text too."""
        return clear_tensors(self.tensors(), down_factor)

    def lora_layers(self) -> dict[str, LoraLayer]:
        """Linear layers by diffusers' and the original names, which ComfyUI's and kohya's files share."""
        return lora_layers(self.tensors(), self._original_layers())

    def defaults(self, scheduler: Mapping[str, Any], pipeline: Mapping[str, Any]) -> Defaults:
        """Z-Image's 50 steps with guidance, or Turbo's 8 without, as on their cards; the shift tells which."""
        is_base = scheduler.get("shift", 1.0) >= BASE_SHIFT
        steps, scale = (50, 4.0) if is_base else (8, 1.0)
        return Defaults(
            takes_guidance=False,
            sampling=Sampling(steps=steps, guidance_scale=0.0, true_cfg_scale=scale),
            upscaling=Upscaling(guidance_scale=0.0, true_cfg_scale=scale),
            negative_prompt="" if is_base else None,
            positions=(self.axes_lens[1], self.axes_lens[2]),
        )

    def _blocks(self, kind: str) -> list[str]:
        count = self.n_layers if kind == "layers" else self.n_refiner_layers
        return [f"{kind}.{index}" for index in range(count)]

    def _tensors(self) -> Tensors:
        width, time = self.dim, min(self.dim, EMBEDDING)
        numbers = PACKING**2 * self.in_channels
        yield "x_pad_token", (1, width)
        yield "cap_pad_token", (1, width)
        yield from linear("all_x_embedder.2-1", numbers, width)
        yield from linear("all_final_layer.2-1.linear", width, numbers)
        yield from linear("all_final_layer.2-1.adaLN_modulation.1", time, width)
        yield from linear("t_embedder.mlp.0", TIME_CHANNELS, TIME_HIDDEN)
        yield from linear("t_embedder.mlp.2", TIME_HIDDEN, time)
        yield "cap_embedder.0.weight", (self.cap_feat_dim,)
        yield from linear("cap_embedder.1", self.cap_feat_dim, width)
        for kind in ("noise_refiner", "context_refiner", "layers"):
            for block in self._blocks(kind):
                yield from self._block(block)
                if kind != "context_refiner":
                    yield from linear(f"{block}.adaLN_modulation.0", time, 4 * width)

    def _block(self, block: str) -> Tensors:
        width, hidden = self.dim, int(self.dim / 3 * 8)
        for name in PROJECTIONS:
            yield f"{block}.attention.{name}.weight", (width, width)
        for name in ("norm_q", "norm_k"):
            yield f"{block}.attention.{name}.weight", (width // self.n_heads,)
        for name, shape in {"w1": (hidden, width), "w2": (width, hidden), "w3": (hidden, width)}.items():
            yield f"{block}.feed_forward.{name}.weight", shape
        for name in ("attention_norm1", "ffn_norm1", "attention_norm2", "ffn_norm2"):
            yield f"{block}.{name}.weight", (width,)

    def _original_layers(self) -> Layers:
        """Queries, keys and values are one layer; embedder and final layer have no patch size in their names."""
        for kind in ("noise_refiner", "context_refiner", "layers"):
            for block in self._blocks(kind):
                yield f"{block}.attention.qkv", tuple(f"{block}.attention.{name}" for name in QKV)
                yield f"{block}.attention.out", (f"{block}.attention.to_out.0",)
        yield "x_embedder", ("all_x_embedder.2-1",)
        yield "final_layer.linear", ("all_final_layer.2-1.linear",)
        yield "final_layer.adaLN_modulation.1", ("all_final_layer.2-1.adaLN_modulation.1",)


def check_positions(size: tuple[int, int], axes_lens: Sequence[int]) -> None:
    """Raises ValueError for an image of `size` tokens beyond the table of positions."""
    if size[0] > axes_lens[1] or size[1] > axes_lens[2]:
        raise ValueError(
            f"Z-Image has positions for {axes_lens[1]} x {axes_lens[2]} tokens at most, got {size[0]} x {size[1]}"
        )


_LENGTHS = (1536, 512, 512)
_TEXT = TextEncoders(numbers=4_022_468_096, heads=32, channels=2560, hidden=9728)
"""Qwen3-4B."""


def _hub_model(name: str, short: str, shift: float) -> HubModel:
    shape = ZImageShape(axes_lens=_LENGTHS)
    return HubModel(
        id=name,
        short=short,
        native_size=1024,
        shape=shape,
        defaults=shape.defaults({"shift": shift}, {}),
        configs={"transformer": {"axes_lens": _LENGTHS}, "vae": AUTOENCODER_KL},
        text=_TEXT,
    )


CARD = Card(
    pipeline="ZImagePipeline",
    scheduler="FlowMatchEulerDiscreteScheduler",
    parts={
        "transformer": "diffusers.ZImageTransformer2DModel",
        "vae": "diffusers.AutoencoderKL",
        "text_encoder": "transformers.Qwen3Model",
        "tokenizer": None,
        "scheduler": None,
    },
    shape_of=ZImageShape.of,
    packing=PACKING,
    channels_per_latent=1,
    vae_channels=(128, 256, 512, 512),
    latent_channels=16,
    native_size=1024,
    guides_in_one_pass=True,
    hoists_modulation=False,
    token_limits={},
    schedule={"shift": 3.0},
    originals={r"(.+\.attention)\.([qk])_norm\.weight": r"\1.norm_\2.weight", r"norm_final\.weight": ""},
    files={"text_encoder": ("qwen3_4b", "qwen_3_4b"), "vae": ("ae",)},
    hub_models=(_hub_model(TURBO, "z-image-turbo", 3.0), _hub_model(BASE, "z-image", BASE_SHIFT)),
)
