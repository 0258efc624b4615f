"""What diffusers itself offers for full attention on several devices: Ulysses and ring attention."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal
from unittest import mock

from diffusers import ContextParallelConfig, FluxPipeline
from torch.distributed.device_mesh import init_device_mesh

from clear_dist.comm.group import Group

Kind = Literal["Ulysses", "ring"]


class Baseline:
    """A pipeline that shares its weights with another, over groups of `ranks`; all ranks of `world` make it.

    Where `world` is larger, each group of `ranks` does the same.
    """

    def __init__(self, pipe: FluxPipeline, kind: Kind, ranks: int, world: Group) -> None:
        weights = [*pipe.transformer.parameters(), *pipe.transformer.buffers()]
        transformer = copy.deepcopy(pipe.transformer, {id(weight): weight for weight in weights})
        device = world.device.type
        if kind == "ring" and device == "cuda":
            transformer.set_attention_backend("_native_flash")  # the default one has no log-sum-exp
            pipe.transformer.set_attention_backend("native")  # the default again: the line above changes it for all
        degrees = (ranks, 1) if kind == "ring" else (1, ranks)
        self._error: Exception | None = None
        try:
            mesh = init_device_mesh(
                device, (world.size // ranks, *degrees), mesh_dim_names=("copies", "ring", "ulysses")
            )
            config = ContextParallelConfig(ring_degree=degrees[0], ulysses_degree=degrees[1], mesh=mesh)
            with _a_device_to_count(device):
                transformer.enable_parallelism(config=config)
        except Exception as error:
            self._error = error
        self._pipe = FluxPipeline(**{**pipe.components, "transformer": transformer})
        self._pipe.set_progress_bar_config(disable=True)

    @contextmanager
    def ready(self) -> Iterator[FluxPipeline]:
        """Raises what diffusers raised when it was made."""
        if self._error is not None:
            raise self._error
        yield self._pipe


def _a_device_to_count(device: str) -> mock._patch | nullcontext:
    """diffusers divides by the number of accelerators, which on a CPU is 0."""
    return nullcontext() if device == "cuda" else mock.patch("torch.accelerator.device_count", return_value=1)
