"""diffusers' AutoencoderKL layer by layer, each a map from stripe to stripe with the module's own weights.

Layers come as a flat sequence, so that a layer's input is freed as soon as the next one starts.

Shapes: B batch, C channels, E my rows with halos, W columns, L my positions.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D, UNetMidBlock2D, UpDecoderBlock2D
from torch import Tensor

from clear_dist.engine.strided import EnlargingConv
from clear_dist.vae.stripe_ops import StripeOps, frame, unframe

Layer = Callable[[Tensor], Tensor]


def decoder_layers(ops: StripeOps, decoder: Decoder) -> Iterator[Layer]:
    """Raises ValueError for blocks of a kind unknown here."""
    yield partial(ops.convolve, conv=decoder.conv_in)
    yield from _mid_layers(ops, decoder.mid_block)
    for block in decoder.up_blocks:
        _require(block, UpDecoderBlock2D)
        yield from (partial(_resnet, ops, resnet) for resnet in block.resnets)
        yield from (partial(ops.convolve, conv=up.conv, upsample=True) for up in block.upsamplers or ())
    yield partial(_head, ops, decoder)


def encoder_layers(ops: StripeOps, encoder: Encoder) -> Iterator[Layer]:
    """Raises ValueError for blocks of a kind unknown here."""
    yield partial(ops.convolve, conv=encoder.conv_in)
    for block in encoder.down_blocks:
        _require(block, DownEncoderBlock2D)
        yield from (partial(_resnet, ops, resnet) for resnet in block.resnets)
        yield from (partial(ops.convolve, conv=down.conv) for down in block.downsamplers or ())
    yield from _mid_layers(ops, encoder.mid_block)
    yield partial(_head, ops, encoder)


def _mid_layers(ops: StripeOps, block: Any) -> Iterator[Layer]:
    _require(block, UNetMidBlock2D)
    yield partial(_resnet, ops, block.resnets[0])
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        if attention is not None:
            yield partial(_attention, ops, attention)
        yield partial(_resnet, ops, resnet)


def _resnet(ops: StripeOps, block: Any, x_BCEW: Tensor) -> Tensor:
    batch, _, extended, width = x_BCEW.shape
    # One row more than a stripe, so that the second convolution can overwrite its input.
    room = x_BCEW.new_empty(batch, block.conv1.out_channels, extended + 1, width)
    norm = ops.normalised(x_BCEW, block.norm1, block.nonlinearity)
    hidden_BCEW = ops.convolve(x_BCEW, block.conv1, norm, out_BCEW=room[:, :, 1:])

    def add_shortcut(piece: Tensor, rows: slice) -> Tensor:
        shortcut = x_BCEW[:, :, rows] if block.conv_shortcut is None else block.conv_shortcut(x_BCEW[:, :, rows])
        return piece.add_(shortcut).div_(block.output_scale_factor)

    norm = ops.normalised(hidden_BCEW, block.norm2, block.nonlinearity)
    return ops.convolve(hidden_BCEW, block.conv2, norm, after=add_shortcut, out_BCEW=room[:, :, :-1])


def _attention(ops: StripeOps, block: Any, x_BCEW: Tensor) -> Tensor:
    rows_BCRW = unframe(x_BCEW)
    normed_BLC = ops.normalised(x_BCEW, block.group_norm)(rows_BCRW).flatten(2).transpose(1, 2)
    out_BLC = ops.attend(block.to_q(normed_BLC), block.to_k(normed_BLC), block.to_v(normed_BLC), block.heads)
    out_BCRW = block.to_out[0](out_BLC).transpose(1, 2).reshape(rows_BCRW.shape)
    return frame((out_BCRW + rows_BCRW).div_(block.rescale_output_factor))


def _head(ops: StripeOps, coder: Any, x_BCEW: Tensor) -> Tensor:
    norm = ops.normalised(x_BCEW, coder.conv_norm_out, coder.conv_act)
    return ops.convolve(x_BCEW, coder.conv_out, norm, upsample=isinstance(coder.conv_out, EnlargingConv))


def _require(block: Any, kind: type) -> None:
    if type(block) is not kind:
        raise ValueError(f"this block of the VAE must be a {kind.__name__}, got {type(block).__name__}")
