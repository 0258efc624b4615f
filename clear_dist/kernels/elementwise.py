"""What is between products of matrices, a launch each; the torch forms are in `engine/parts.py`.

On the meta device each allocates what it would elsewhere, which is what a plan counts. Tensors may be views, such as
chunks of tokens, as long as channels lie together (`takes`); any of them may have no tokens.

Shapes: B batch, L tokens, C channels, N heads, D head dim.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from clear_dist.kernels import power_of_two

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_CHANNELS = 16_384
"""A token's, which one program holds in registers to normalise it."""
TILE = 4096
"""Numbers of one program where a token can be cut in several."""
NUMBERS_OF_A_WARP = 512


def takes(*tensors: Tensor) -> bool:
    """Whether the kernels can read, or write, all of these; they have no gradients."""
    known = (x.dtype in DTYPES and x.stride(-1) == 1 and x.shape[-1] <= MOST_CHANNELS for x in tensors)
    return not torch.is_grad_enabled() and all(known)


def modulate(x_BLC: Tensor, shift_BC: Tensor, scale_BC: Tensor, eps: float) -> Tensor:
    """Layer norm, times 1 + scale, plus shift."""
    out_BLC = x_BLC.new_empty(x_BLC.shape)
    _launch("modulate_kernel", (x_BLC, *_each(x_BLC, shift_BC, scale_BC)), (out_BLC,), *_whole(x_BLC), eps)
    return out_BLC


def add_gated(x_BLC: Tensor, gate_BC: Tensor, y_BLC: Tensor, out_BLC: Tensor) -> None:
    """x + gate * y; `out_BLC` may be `x_BLC`."""
    _launch("add_gated_kernel", (x_BLC, *_each(x_BLC, gate_BC), y_BLC), (out_BLC,), *_whole(x_BLC))


def add_and_modulate(
    x_BLC: Tensor, gate_BC: Tensor, y_BLC: Tensor, shift_BC: Tensor, scale_BC: Tensor, total_BLC: Tensor, eps: float
) -> Tensor:
    """x + gate * y, written to `total_BLC`; returns `modulate` of it."""
    out_BLC = x_BLC.new_empty(x_BLC.shape)
    gate_BC, shift_BC, scale_BC = _each(x_BLC, gate_BC, shift_BC, scale_BC)
    read = x_BLC, gate_BC, y_BLC, shift_BC, scale_BC
    _launch("add_and_modulate_kernel", read, (total_BLC, out_BLC), *_whole(x_BLC), eps)
    return out_BLC


def gelu(x_BLC: Tensor, out_BLC: Tensor) -> None:
    """GELU's tanh approximation."""
    channels = x_BLC.shape[-1]
    _launch("gelu_kernel", (x_BLC,), (out_BLC,), {"BLOCK": min(TILE, power_of_two(channels))}, channels)


def rotate(
    xs_BLND: Sequence[Tensor],
    weights_D: Sequence[Tensor],
    cos_LD: Tensor,
    sin_LD: Tensor,
    outs_BLND: Sequence[Tensor],
    eps: float,
) -> None:
    """RMS norm of each head, then rotation of neighbouring pairs; of one tensor, or of two with equal shapes."""
    heads, head_dim = xs_BLND[0].shape[2:]
    block, count = power_of_two(head_dim), len(xs_BLND)
    sizes = {"HEAD_DIM": head_dim, "HEADS": max(1, min(TILE // block, power_of_two(heads))), "BLOCK": block}
    kernel = ("rotate_kernel", "rotate_both_kernel")[count - 1]
    _launch(kernel, (*xs_BLND, *weights_D, cos_LD, sin_LD), outs_BLND, sizes, heads, eps, count=count)


def _each(x_BLC: Tensor, *modulation: Tensor) -> Iterator[Tensor]:
    """Modulation of each picture, which may be one for all, [1, C]."""
    return (each.expand(len(x_BLC), -1) for each in modulation)


def _whole(x_BLC: Tensor) -> tuple[dict[str, int], int]:
    """Sizes for programs of whole tokens, and what they are to cover."""
    channels = x_BLC.shape[-1]
    return {"BLOCK": power_of_two(channels)}, channels


def _launch(
    kernel: str,
    read: Sequence[Tensor],
    written: Sequence[Tensor],
    sizes: dict[str, int],
    across: int,
    *numbers: float,
    count: int = 1,
) -> None:
    """Programs for all tokens of `count` tensors, as many across as cover channels, or heads."""
    out, tensors = written[0], (*read, *written)
    if out.is_meta or not out.numel():
        return
    from clear_dist.kernels import elementwise_kernel

    tile, step = sizes["BLOCK"] * sizes.get("HEADS", 1), sizes.get("HEADS", sizes["BLOCK"])
    grid = (out.shape[1], -(-across // step), out.shape[0] * count)
    strides = (tensor.stride() for tensor in tensors)
    warps = min(16, max(1, tile // NUMBERS_OF_A_WARP))
    with torch.cuda.device_of(out):
        getattr(elementwise_kernel, kernel)[grid](*tensors, *strides, across, *numbers, **sizes, num_warps=warps)
