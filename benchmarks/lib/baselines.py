"""diffusers' own full attention: its blocks on one rank, Ulysses and ring attention on several; compiled or not."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal
from unittest import mock

from diffusers import ContextParallelConfig, FluxPipeline
from torch.distributed.device_mesh import init_device_mesh

from clear_dist.comm.group import Group

Kind = Literal["Ulysses", "ring"]
COMPILATION = {"dynamic": True}
"""Options of torch.compile for blocks, the same as for the engine's own parts."""


def copied(pipe: FluxPipeline) -> FluxPipeline:
    """A pipeline with a transformer of its own that shares the weights of `pipe`."""
    weights = [*pipe.transformer.parameters(), *pipe.transformer.buffers()]
    transformer = copy.deepcopy(pipe.transformer, {id(weight): weight for weight in weights})
    copy_of_pipe = FluxPipeline(**{**pipe.components, "transformer": transformer})
    copy_of_pipe.set_progress_bar_config(disable=True)
    return copy_of_pipe


def stock(pipe: FluxPipeline, *, compile: bool) -> FluxPipeline:
    """`pipe` itself, or a copy with compiled blocks."""
    if not compile:
        return pipe
    compiled = copied(pipe)
    compiled.transformer.compile_repeated_blocks(**COMPILATION)
    return compiled


class Baseline:
    """A pipeline over groups of `ranks` that shares the weights of `pipe`; all ranks of `world` make it.

    In a larger `world` each group of `ranks` does the same work.
    """

    def __init__(self, pipe: FluxPipeline, kind: Kind, ranks: int, world: Group, *, compile: bool) -> None:
        self._pipe = copied(pipe)
        transformer = self._pipe.transformer
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
        if compile:
            transformer.compile_repeated_blocks(**COMPILATION)

    @contextmanager
    def ready(self) -> Iterator[FluxPipeline]:
        """The pipeline; raises the error that diffusers raised when it was made."""
        if self._error is not None:
            raise self._error
        yield self._pipe


def _a_device_to_count(device: str) -> mock._patch | nullcontext:
    """A stand-in device on a CPU: diffusers divides by the number of accelerators."""
    return nullcontext() if device == "cuda" else mock.patch("torch.accelerator.device_count", return_value=1)
