"""A second architecture, as far from FLUX as the engine must reach: what diffusers would hold of it.

Two blocks; absolute positions; in joint attention image tokens stand before text tokens, which may be padded; each block
attends to the image alone besides; latents come and go as [B, C, H, W]; guidance is a batch of two.
"""

import math
from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

PATCH, LATENTS, WIDTH, HEADS, TEXT_WIDTH = 2, 3, 32, 4, 20


def attend(attn: Any, qkv: list[Tensor], mask: Tensor | None) -> Tensor:
    query, key, value = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in qkv)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


class JointProcessor:
    """Image and text, in this order, see each other; `hidden` [L, L] or None says which image tokens do not."""

    def __init__(self, hidden: Tensor | None = None) -> None:
        self.hidden = hidden

    def __call__(self, attn: Any, image: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        tokens, batch = image.shape[1], len(image)
        qkv = [torch.cat(pair, dim=1) for pair in zip(attn.of_image(image), attn.of_text(text), strict=True)]
        seen = torch.ones(batch, 1, qkv[0].shape[1], qkv[0].shape[1], dtype=torch.bool)
        if self.hidden is not None:
            seen[:, :, :tokens, :tokens] = ~self.hidden
        seen[..., tokens:] &= mask[:, None, None]
        output = attend(attn, qkv, seen)
        return attn.out(output[:, :tokens]), attn.text_out(output[:, tokens:])


class ImageProcessor:
    """The image alone sees itself."""

    def __init__(self, hidden: Tensor | None = None) -> None:
        self.hidden = hidden

    def __call__(self, attn: Any, image: Tensor) -> Tensor:
        return attn.out(attend(attn, attn.of_image(image), None if self.hidden is None else ~self.hidden))


class Attention(nn.Module):
    heads, head_dim = HEADS, WIDTH // HEADS

    def __init__(self, *, joint: bool) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        if joint:
            self.add_q, self.add_k, self.add_v, self.text_out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.processor: Any = JointProcessor() if joint else ImageProcessor()

    def get_processor(self) -> Any:
        return self.processor

    def set_processor(self, processor: Any) -> None:
        self.processor = processor

    def of_image(self, x: Tensor) -> list[Tensor]:
        return [self.to_q(x), self.to_k(x), self.to_v(x)]

    def of_text(self, x: Tensor) -> list[Tensor]:
        return [self.add_q(x), self.add_k(x), self.add_v(x)]

    def forward(self, *inputs: Tensor) -> Any:
        return self.processor(self, *inputs)


class Modulation(nn.Module):
    """Shifts and scales from the time."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, time: Tensor) -> Tensor:
        return self.linear(silu(time))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn2, self.attn = Attention(joint=False), Attention(joint=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.modulation = Modulation()
        self.ff = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, image: Tensor, text: Tensor, time: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale = self.modulation(time)[:, None].chunk(2, dim=-1)
        image = image + self.attn2(self.norm(image) * (1 + scale) + shift)
        to_image, to_text = self.attn(self.norm(image), self.norm(text), mask)
        image, text = image + to_image, text + to_text
        return image + self.ff(self.norm(image)), text + self.ff(self.norm(text))


class Positions(nn.Module):
    """Absolute ones, [height x width, WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        rates = torch.exp(-math.log(100.0) * torch.arange(WIDTH // 4) / (WIDTH // 4))
        self.register_buffer("rates", rates, persistent=False)

    def forward(self, height: int, width: int) -> Tensor:
        rates = self.rates
        rows, columns = (torch.arange(side, device=rates.device)[:, None] * rates for side in (height, width))
        rows, columns = rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)
        return torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos()], dim=-1).flatten(0, 1)


class SecondTransformer(nn.Module):
    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(LATENTS, WIDTH, PATCH, stride=PATCH)
        self.positions = Positions()
        self.text = nn.Linear(TEXT_WIDTH, WIDTH)
        self.time = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.out = nn.Linear(WIDTH, LATENTS * PATCH**2)

    def forward(self, latents: Tensor, text: Tensor, timestep: Tensor, mask: Tensor) -> Tensor:
        patches = self.patches(latents)
        height, width = patches.shape[2:]
        image = patches.flatten(2).transpose(1, 2) + self.positions(height, width)
        time, text = self.time(timestep[:, None]), self.text(text)
        for block in self.blocks:
            image, text = block(image, text, time, mask)
        pixels = self.out(image).unflatten(1, (height, width)).unflatten(-1, (LATENTS, PATCH, PATCH))
        return pixels.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


class SecondPipeline:
    """A loop of denoising; the text and its mask are made once, latents once a step, for both halves of guidance."""

    _execution_device = torch.device("cpu")
    components: ClassVar[dict[str, Any]] = {}

    def __init__(self, transformer: SecondTransformer) -> None:
        self.transformer = transformer
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)

    @torch.no_grad()
    def __call__(self, text: Tensor, mask: Tensor, latents: Tensor, *, steps: int, guidance: float = 4.0) -> Tensor:
        """Latents [B, C, H, W]; `text` [2 B, T, C] is of negative prompts, then of prompts, as `mask` [2 B, T]."""
        text, mask = text.clone(), mask.clone()
        self.scheduler.set_timesteps(steps)
        for timestep in self.scheduler.timesteps:
            both = torch.cat([latents, latents])
            negative, positive = self.transformer(both, text, timestep.expand(len(both)) / 1000, mask).chunk(2)
            velocity = negative + guidance * (positive - negative)
            latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        return latents
