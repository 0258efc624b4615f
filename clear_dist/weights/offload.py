"""Text encoders and VAE in host memory while they are not in use.

Made of accelerate's hooks, which diffusers knows, so that a pipeline still reports the device that it runs on. Unlike
accelerate's own offloading, weights never travel back: those in host memory are kept.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn


def offloaded_parts(names: Iterable[str]) -> tuple[str, ...]:
    """Names of the parts of a pipeline that `--offload` keeps in host memory."""
    return tuple(sorted(name for name in names if name == "vae" or name.startswith("text_encoder")))


class FromHost(ModelHook):
    """Brings a module's weights to the device before its forward, and drops them there afterwards."""

    def __init__(self, device: torch.device) -> None:
        self.execution_device = device
        self._held: list[tuple[nn.Module, str, Tensor]] = []

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module.to("cpu")

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not self._held:
            self._held = list(tensors_of(module))
            there = {held: self._on_device(held) for _, _, held in self._held}  # once, also where modules share it
            for owner, name, held in self._held:
                setattr(owner, name, there[held])
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        for owner, name, held in self._held:
            setattr(owner, name, held)
        self._held = []
        return output

    def _on_device(self, held: Tensor) -> Tensor:
        there = held.to(self.execution_device)
        return nn.Parameter(there, held.requires_grad) if isinstance(held, nn.Parameter) else there

    def detach_hook(self, module: nn.Module) -> nn.Module:
        return module.to(self.execution_device)


class Offloaded:
    """Parts of a pipeline, in host memory until `remove`."""

    def __init__(self, pipe: Any, device: torch.device, names: Iterable[str]) -> None:
        """Parts that `pipe` has not are passed over; raises ValueError where diffusers offloads one already."""
        parts = {name: part for name in names if (part := getattr(pipe, name, None)) is not None}
        for name, part in parts.items():
            if hasattr(part, "_hf_hook"):
                raise ValueError(f"offload and diffusers' own offloading exclude each other, got both for {name}")
        self._parts = list(parts.values())
        for part in self._parts:
            add_hook_to_module(part, FromHost(device))

    def remove(self) -> None:
        """Bring all of them back to the device."""
        for part in self._parts:
            remove_hook_from_module(part)


def tensors_of(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Owner, name and tensor of each parameter and buffer."""
    for owner in module.modules():
        for name, tensor in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)):
            yield owner, name, tensor


@contextmanager
def brought(module: nn.Module) -> Iterator[None]:
    """Context in which a module of `Offloaded` is on the device, for uses other than its forward."""
    hook = getattr(module, "_hf_hook", None)
    if not isinstance(hook, FromHost):
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)
