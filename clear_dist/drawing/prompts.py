"""Prompts, encoded on rank 0 and broadcast: the other ranks need no text encoders."""

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
    """Embeddings with a row per picture, by name in `adapter.arguments`; only rank 0 uses its text encoders.

    There are as many negative prompts, or none; `counters` count the broadcast as `other_bytes`.
    """
    encoded: Encoded = []
    if group.rank == 0:
        encoded = adapter.encode(prompts, max_sequence_length)
        encoded += (
            nothing(adapter) if negative_prompts is None else adapter.encode(negative_prompts, max_sequence_length)
        )
    return share(adapter, group, counters, encoded, num_images=num_images)


def nothing(adapter: PipelineAdapter) -> Encoded:
    return [None] * (len(adapter.arguments) // 2)


def share(
    adapter: PipelineAdapter, group: Group, counters: Counters, encoded: Encoded, *, num_images: int
) -> dict[str, Tensor]:
    """`encode_prompts` from rank 0's embeddings: of prompts, then of negative prompts or `nothing`."""
    received = group.broadcast_tensors(encoded)
    counters.add("other_bytes", sum(tensor.nbytes for tensor in received if tensor is not None))
    return {
        name: tensor.repeat_interleave(num_images, dim=0)
        for name, tensor in zip(adapter.arguments, received, strict=True)
        if tensor is not None
    }
