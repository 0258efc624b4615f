"""Checks that all ranks hold the same values; otherwise they compute different pictures, or wait for ever."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from clear_dist.comm.clock import Clock
from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group

LARGEST_WEIGHT = 8191

MOST_SHAPES = 18
"""Two numbers per input; models have at most six inputs, ControlNets nine."""

SAMPLED_BYTES = 32
"""Compared of each weight, from its beginning to its end."""

LARGEST_DEVIATION = 0.05
"""Distance between ranks' embeddings of length 1: bfloat16 rounds by 0.004, another prompt changes more."""


class SameCall:
    """Check that all ranks are in the same forward; finished late, so that the stale schedule never waits for it."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._finish: Callable[[], bool] | None = None

    def begin(self, group: Group, clock: Clock, inputs: Sequence[Tensor]) -> None:
        """All ranks call this at the start of each forward."""
        shapes = [size for x in inputs for size in (x.ndim, x.numel())]
        padded = (shapes + [0] * MOST_SHAPES)[:MOST_SHAPES]
        self._finish = group.start_equal([clock.step, clock.turn, *padded])

    def require(self) -> None:
        """Raises ValueError on all ranks at different passes; called before anything is sent."""
        if self._finish is None:
            return
        finish, self._finish = self._finish, None
        with self._counters.waiting("comm: agree wait", torch.device("cpu")):
            same = finish()
        if not same:
            raise ValueError(
                "every rank must call the pipeline alike, but passes, batch, prompt length or size differ; "
                "give all ranks the same arguments"
            )


def require_equal_on_all_ranks(
    drawn: list[Tensor], encoded: list[Tensor], settings: dict[str, Any], group: Group, *, refusal: str | None = None
) -> None:
    """Raises ValueError on all ranks unless `drawn` is equal to the bit, `encoded` up to rounding, `settings` by ==.

    A `refusal` of one rank is raised on all.
    """
    everyone = group.gather_objects((settings, [shadow(x) for x in encoded], refusal))
    for rank, (_, _, why) in enumerate(everyone):
        if why is not None:
            raise ValueError(why if rank == group.rank else f"rank {rank} refuses: {why}")
    for name in settings:
        values = [theirs[name] for theirs, _, _ in everyone]
        if any(value != values[0] for value in values):
            raise ValueError(f"every rank must be given the same {name}, got {', '.join(map(str, values))}")
    if not group.equal([number for x in drawn for number in checksum(x)]):
        raise ValueError(
            "every rank must be given the same noise, pictures, scales and step, but they differ; "
            "pass generator=torch.Generator().manual_seed(n) with the same n on all ranks"
        )
    shadows = torch.tensor([theirs for _, theirs, _ in everyone])
    if (shadows - shadows[0]).abs().max() > LARGEST_DEVIATION:
        raise ValueError("every rank must be given the same prompt, but their embeddings differ; pass equal prompts")


def shadow(x: Tensor) -> list[float]:
    """Four coordinates of a tensor along fixed directions, in units of its length; 0 where it has no values."""
    if x.is_meta:
        return [0.0] * 4
    values = x.detach().flatten().double()
    angles = torch.outer(torch.arange(1, 5, device=x.device).double(), torch.arange(len(values), device=x.device))
    return (angles.cos() @ values / values.norm().clamp_min(1e-30)).nan_to_num().tolist()


def checksum(x: Tensor) -> tuple[int, int]:
    """Two integer sums over a tensor's bits, one weighted by position: sums of floats would depend on threads.

    0 where it has no values.
    """
    if x.is_meta:
        return 0, 0
    whole_number = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    bits = x.detach().contiguous().flatten().view(whole_number).long()
    weights = torch.arange(len(bits), device=bits.device) % LARGEST_WEIGHT + 1
    return int(bits.sum()), int((bits * weights).sum())


def require_equal_settings(group: Group, **settings: Any) -> None:
    """Raises ValueError on all ranks where their arguments differ: each would cut its own way."""
    everyone = group.gather_objects(settings)
    for name in settings:
        values = [theirs[name] for theirs in everyone]
        if any(value != values[0] for value in values):
            shown = "different files" if name == "clear_weights" else ", ".join(map(str, values))
            raise ValueError(f"{name} must be the same on all ranks, got {shown}")


def require_equal_parts(group: Group, parts: Mapping[str, nn.Module | None]) -> None:
    """Raises ValueError on all ranks where parts of one name differ between ranks that have them."""
    mine = {name: (adapters_of(part), fingerprint(part)) for name, part in parts.items() if part is not None}
    everyone = group.gather_objects(mine)
    for name in parts:
        found = [theirs[name] for theirs in everyone if name in theirs]
        if len(set(found)) > 1:
            shown = "; ".join(map(", ".join, found))
            raise ValueError(f"{name} must be the same on all ranks, got adapters and weights {shown}")


def adapters_of(model: nn.Module) -> str:
    """A model's active adapters with their scales, such as LoRA, in words that differ where any layer's do."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "merged_adapters")}
    states = {
        name: [
            f"{each} x {getattr(layer, 'scaling', {}).get(each, 1.0):.6g}{' fused' * (each in layer.merged_adapters)}"
            for each in (() if layer.disable_adapters else sorted(layer.active_adapters))
        ]
        for name, layer in layers.items()
    }
    shown = ", ".join(sorted({each for state in states.values() for each in state})) or "none"
    return f"{shown} ({crc32(repr(states).encode()):08x})"


class CurrentScheduler:
    """Whatever scheduler a pipeline has now: users replace it after `parallelize`."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe

    @property
    def name(self) -> str:
        return type(self._pipe.scheduler).__name__

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe.scheduler, name)


def schedule_of(scheduler: Any) -> str:
    """A scheduler's steps, in words that differ where any noise level or setting does."""
    levels = [torch.as_tensor(getattr(scheduler, name, ())).tolist() for name in ("timesteps", "sigmas")]
    config = getattr(scheduler, "config", {})
    # diffusers' own entries, such as a set as a list, are in another order in each process.
    settings = sorted((name, str(value)) for name, value in config.items() if not name.startswith("_"))
    kind = scheduler.name if isinstance(scheduler, CurrentScheduler) else type(scheduler).__name__
    return f"{kind} ({crc32(repr((levels, settings)).encode()):08x})"


def fingerprint(model: nn.Module) -> str:
    """Digest of names, shapes and dtypes of all weights, and of a few bytes of each.

    Shards, and weights on the meta device, differ between ranks that are alike: of these no bytes count.
    """
    tensors = dict(chain(model.named_parameters(), model.named_buffers()))
    state = repr([(name, tuple(x.shape), x.dtype) for name, x in tensors.items()]).encode()
    whole = [x for x in tensors.values() if not (x.is_meta or hasattr(x, "to_local"))]
    samples = b"".join(sampled(whole))
    return f"{len(tensors)} tensors ({crc32(samples, crc32(state)):08x})"


def sampled(tensors: Sequence[Tensor]) -> Iterator[bytes]:
    """Bytes of each tensor at equal distances, brought from each device at once."""
    by_device = defaultdict(list)
    for x in tensors:
        flat = x.detach().reshape(-1).view(torch.uint8)
        # Odd, so that it meets high and low bytes.
        by_device[x.device].append(flat[:: len(flat) // SAMPLED_BYTES | 1][:SAMPLED_BYTES])
    on_host = {device: iter(torch.cat(x).cpu().split([len(each) for each in x])) for device, x in by_device.items()}
    for x in tensors:
        yield next(on_host[x.device]).numpy().tobytes()
