"""Triton kernels between products of matrices: each reads its tensors once, computes in float32 and rounds once.

Programs: (token, block of its channels or heads, batch). Strides are in elements; channels lie together.
Shape suffixes: C channels, N heads, D head dim.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
TWICE_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
CUBIC = tl.constexpr(0.044715)
"""Factors of the tanh approximation of GELU (https://arxiv.org/abs/1606.08415)."""


@triton.jit
def row(tensor, strides, token, batch):
    """Pointer to a token; a tensor may have more elements than an int32 can count."""
    return tensor + batch.to(tl.int64) * strides[0] + token.to(tl.int64) * strides[1]


@triton.jit
def write(place, x, inside):
    if INTERPRETED and place.dtype.element_ty == tl.bfloat16:  # it would not round, but cut off
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    tl.store(place, x.to(place.dtype.element_ty), mask=inside)


@triton.jit
def normalised(x_C, shift, scale, channel_C, channels, eps):
    inside_C = channel_C < channels
    centred_C = tl.where(inside_C, x_C - tl.sum(x_C, 0) / channels, 0.0)
    normed_C = centred_C * tl.rsqrt(tl.sum(centred_C * centred_C, 0) / channels + eps)
    shift_C = tl.load(shift + channel_C, mask=inside_C, other=0.0).to(tl.float32)
    scale_C = tl.load(scale + channel_C, mask=inside_C, other=0.0).to(tl.float32)
    return normed_C * (1 + scale_C) + shift_C


@triton.jit
def gated_sum(x, gate, y, channel_C, inside_C):
    x_C = tl.load(x + channel_C, mask=inside_C, other=0.0).to(tl.float32)
    gate_C = tl.load(gate + channel_C, mask=inside_C, other=0.0).to(tl.float32)
    return x_C + gate_C * tl.load(y + channel_C, mask=inside_C, other=0.0).to(tl.float32)


@triton.jit
def modulate_kernel(
    x, shift, scale, out, x_strides, shift_strides, scale_strides, out_strides, channels, eps, BLOCK: tl.constexpr
):  # fmt: skip
    token, batch, channel_C = tl.program_id(0), tl.program_id(2), tl.arange(0, BLOCK)
    inside_C = channel_C < channels
    x_C = tl.load(row(x, x_strides, token, batch) + channel_C, mask=inside_C, other=0.0).to(tl.float32)
    shift, scale = shift + batch * shift_strides[0], scale + batch * scale_strides[0]
    out_C = normalised(x_C, shift, scale, channel_C, channels, eps)
    write(row(out, out_strides, token, batch) + channel_C, out_C, inside_C)


@triton.jit
def add_gated_kernel(
    x, gate, y, out, x_strides, gate_strides, y_strides, out_strides, channels, BLOCK: tl.constexpr
):  # fmt: skip
    token, batch, channel_C = tl.program_id(0), tl.program_id(2), tl.arange(0, BLOCK)
    inside_C = channel_C < channels
    x, y = row(x, x_strides, token, batch), row(y, y_strides, token, batch)
    sum_C = gated_sum(x, gate + batch * gate_strides[0], y, channel_C, inside_C)
    write(row(out, out_strides, token, batch) + channel_C, sum_C, inside_C)


@triton.jit
def add_and_modulate_kernel(
    x, gate, y, shift, scale, total, out,
    x_strides, gate_strides, y_strides, shift_strides, scale_strides, total_strides, out_strides,
    channels, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    token, batch, channel_C = tl.program_id(0), tl.program_id(2), tl.arange(0, BLOCK)
    inside_C = channel_C < channels
    x, y = row(x, x_strides, token, batch), row(y, y_strides, token, batch)
    sum_C = gated_sum(x, gate + batch * gate_strides[0], y, channel_C, inside_C)
    write(row(total, total_strides, token, batch) + channel_C, sum_C, inside_C)
    shift, scale = shift + batch * shift_strides[0], scale + batch * scale_strides[0]
    out_C = normalised(sum_C, shift, scale, channel_C, channels, eps)
    write(row(out, out_strides, token, batch) + channel_C, out_C, inside_C)


@triton.jit
def gelu_kernel(x, out, x_strides, out_strides, channels, BLOCK: tl.constexpr):
    token, batch = tl.program_id(0), tl.program_id(2)
    channel_C = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside_C = channel_C < channels
    x_C = tl.load(row(x, x_strides, token, batch) + channel_C, mask=inside_C, other=0.0).to(tl.float32)
    # (1 + tanh(u)) / 2 is the logistic function of 2 u, without the cancellation where tanh is near -1.
    out_C = x_C * tl.sigmoid((x_C + x_C * x_C * x_C * CUBIC) * TWICE_SQRT_2_OVER_PI)
    write(row(out, out_strides, token, batch) + channel_C, out_C, inside_C)


@triton.jit
def rotated(
    x, weight, cos, sin, out, x_strides, cos_strides, sin_strides, out_strides, batch, heads, eps,
    HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK: HEAD_DIM rounded up to a power of two."""
    token = tl.program_id(0)
    head_N, dim_D = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    in_head_D = dim_D < HEAD_DIM
    inside_ND = (head_N < heads)[:, None] & in_head_D
    x_ND = row(x, x_strides, token, batch) + (head_N * x_strides[2])[:, None] + dim_D
    x_ND = tl.load(x_ND, mask=inside_ND, other=0.0).to(tl.float32)
    weight_D = tl.load(weight + dim_D, mask=in_head_D, other=0.0).to(tl.float32)
    x_ND *= tl.rsqrt(tl.sum(x_ND * x_ND, 1) / HEAD_DIM + eps)[:, None] * weight_D
    # Neighbours are the parts of a complex number.
    real, imaginary = tl.split(tl.reshape(x_ND, [HEADS, BLOCK // 2, 2]))
    turned_ND = tl.reshape(tl.join(-imaginary, real), [HEADS, BLOCK])
    position = token.to(tl.int64)
    cos_D = tl.load(cos + position * cos_strides[0] + dim_D, mask=in_head_D, other=0.0)
    sin_D = tl.load(sin + position * sin_strides[0] + dim_D, mask=in_head_D, other=0.0)
    place_ND = row(out, out_strides, token, batch) + (head_N * out_strides[2])[:, None] + dim_D
    write(place_ND, x_ND * cos_D + turned_ND * sin_D, inside_ND)


@triton.jit
def rotate_kernel(
    x, weight, cos, sin, out, x_strides, weight_strides, cos_strides, sin_strides, out_strides, heads, eps,
    HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2)
    rotated(
        x, weight, cos, sin, out, x_strides, cos_strides, sin_strides, out_strides, batch, heads, eps,
        HEAD_DIM, HEADS, BLOCK,
    )  # fmt: skip


@triton.jit
def rotate_both_kernel(
    x, y, x_weight, y_weight, cos, sin, x_out, y_out,
    x_strides, y_strides, x_weight_strides, y_weight_strides, cos_strides, sin_strides, x_out_strides, y_out_strides,
    heads, eps, HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program for one of two tensors."""
    batch = tl.program_id(2) // 2
    if tl.program_id(2) % 2 == 0:
        rotated(
            x, x_weight, cos, sin, x_out, x_strides, cos_strides, sin_strides, x_out_strides, batch, heads, eps,
            HEAD_DIM, HEADS, BLOCK,
        )  # fmt: skip
    else:
        rotated(
            y, y_weight, cos, sin, y_out, y_strides, cos_strides, sin_strides, y_out_strides, batch, heads, eps,
            HEAD_DIM, HEADS, BLOCK,
        )  # fmt: skip
