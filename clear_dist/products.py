"""Products of float32 matrices on a CPU by oneDNN.

torch has MKL compute them by default, which takes twice as long on AMD's processors.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode


def usable(*tensors: Tensor) -> bool:
    """Whether oneDNN computes products of these: plain float32 tensors, without gradients or autocast."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not torch.backends.mkldnn.is_available():
        return False
    are_known = all(type(x) in (Tensor, Parameter) and x.dtype == torch.float32 and x.numel() > 0 for x in tensors)
    return are_known and bool(torch.backends.mkldnn.enabled)


def product(x: Tensor, weight_OK: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x @ weight.t() + bias, [..., O]; takes seconds where a weight has gaps between its rows."""
    return torch.ops.mkldnn._linear_pointwise(x, weight_OK, bias_O, "none", [], "")


class LinearByOneDNN(TorchFunctionMode):
    """Context in which linear layers of any module compute by oneDNN what it can."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is linear and not kwargs and takes(*args):
            return product(*args)
        return func(*args, **(kwargs or {}))


def takes(x: Tensor, weight_OK: Tensor, bias_O: Tensor | None = None) -> bool:
    """Whether a linear layer is computed by oneDNN."""
    tensors = [each for each in (x, weight_OK, bias_O) if each is not None]
    return usable(*tensors) and weight_OK.is_contiguous() and all(each.device.type == "cpu" for each in tensors)
