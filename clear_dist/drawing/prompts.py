"""Prompts are encoded on rank 0 and broadcast: the other ranks need no text encoders."""

from torch import Tensor

from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.engine.family import Encoded, PipelineAdapter


def encode_prompts(
    adapter: PipelineAdapter,
    group: Group,
    counters: Counters,
    prompts: list[str],
    *,
    negative_prompts: list[str] | None = None,
    max_sequence_length: int = 512,
    num_images: int = 1,
) -> dict[str, Tensor]:
    """The pipeline's arguments for embeddings, a row for each picture; their names are `adapter.arguments`.

    Args:
        adapter: its pipeline's text encoders are used on rank 0 only, and may be None elsewhere.
        negative_prompts: as many as prompts, for classifier-free guidance.
        max_sequence_length: tokens that every prompt is padded or cut to.
        counters: where what is broadcast counts, as `other_bytes`.
        num_images: pictures of each prompt.
    """
    encoded: Encoded = []
    if group.rank == 0:
        encoded = adapter.encode(prompts, max_sequence_length)
        encoded += (
            nothing(adapter) if negative_prompts is None else adapter.encode(negative_prompts, max_sequence_length)
        )
    return share(adapter, group, counters, encoded, num_images=num_images)


def nothing(adapter: PipelineAdapter) -> Encoded:
    """In the place of negative prompts, where there are none."""
    return [None] * (len(adapter.arguments) // 2)


def share(
    adapter: PipelineAdapter, group: Group, counters: Counters, encoded: Encoded, *, num_images: int
) -> dict[str, Tensor]:
    """As `encode_prompts`, from what `encode` gave on rank 0 for prompts, then for negative prompts or `nothing`."""
    received = group.broadcast_tensors(encoded)
    counters.add("other_bytes", sum(tensor.nbytes for tensor in received if tensor is not None))
    return {
        name: tensor.repeat_interleave(num_images, dim=0)
        for name, tensor in zip(adapter.arguments, received, strict=True)
        if tensor is not None
    }
