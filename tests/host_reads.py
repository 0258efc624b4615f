"""What makes the host wait for a GPU, told on a CPU too: reading tensors, and making them from the host's numbers."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READING = {
    *(getattr(Tensor, name) for name in ("item", "tolist", "cpu", "cuda", "numpy")),
    *(getattr(Tensor, name) for name in ("__bool__", "__int__", "__float__", "__index__", "__contains__")),
}
MAKING = {torch.tensor, torch.as_tensor, torch.from_numpy, torch.asarray}
"""A copy to the GPU from memory that is not pinned."""
OPERATIONS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim"}
"""Whose result, or its size, the host must know."""


class _Operations(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.split("::")[1]
        masks = name.startswith("index") and any(
            isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(args[1:2])
        )
        if name in OPERATIONS or masks:
            self._found[f"aten.{name}"] += 1
        return function(*args, **(kwargs or {}))


class HostReads(TorchFunctionMode):
    """Counts reads by name in `found`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self._operations = _Operations(self.found)

    def __enter__(self) -> "HostReads":
        self._operations.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._operations.__exit__(*error)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in READING or function in MAKING:
            self.found[resolve_name(function) or function.__name__] += 1
        return function(*args, **(kwargs or {}))
