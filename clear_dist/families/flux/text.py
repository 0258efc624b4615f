"""Prompts are encoded on rank 0 and broadcast: the other ranks need no text encoders."""

from typing import Any

import torch
from torch import Tensor

from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group

ARGUMENTS = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")
Encoded = list[Tensor | None]
NOTHING: Encoded = [None, None]


def encode_prompts(
    pipe: Any,
    group: Group,
    counters: Counters,
    prompts: list[str],
    *,
    negative_prompts: list[str] | None = None,
    max_sequence_length: int = 512,
    num_images: int = 1,
) -> dict[str, Tensor]:
    """The pipeline's arguments `prompt_embeds` [B, T, C], `pooled_prompt_embeds` [B, C] and their negatives.

    Args:
        pipe: FluxPipeline; its text encoders are used on rank 0 only and may be None elsewhere.
        negative_prompts: as many as prompts, for `true_cfg_scale` above 1.
        max_sequence_length: T, the tokens that every prompt is padded or cut to.
        counters: what is broadcast counts as `other_bytes`.
        num_images: pictures of each prompt; B = len(prompts) x num_images.
    """
    encoded: Encoded = []
    if group.rank == 0:
        for texts in (prompts, negative_prompts):
            encoded += encode(pipe, texts, max_sequence_length) if texts is not None else NOTHING
    return share(group, counters, encoded, num_images=num_images)


@torch.no_grad()
def encode(pipe: Any, texts: list[str], max_sequence_length: int) -> Encoded:
    """[B, T, C] and [B, C], a row for each text."""
    prompt_embeds, pooled, _ = pipe.encode_prompt(prompt=texts, prompt_2=None, max_sequence_length=max_sequence_length)
    return [prompt_embeds, pooled]


def share(group: Group, counters: Counters, encoded: Encoded, *, num_images: int) -> dict[str, Tensor]:
    """As `encode_prompts`, from what `encode` gave on rank 0 for prompts, then for negative prompts or NOTHING."""
    received = group.broadcast_tensors(encoded)
    counters.add("other_bytes", sum(tensor.nbytes for tensor in received if tensor is not None))
    return {
        name: tensor.repeat_interleave(num_images, dim=0)
        for name, tensor in zip(ARGUMENTS, received, strict=True)
        if tensor is not None
    }
