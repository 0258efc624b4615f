"""What the VAE holds of a stripe (clear_dist/vae): two feature maps, and the temporary tensors of a chunk of rows."""

from collections.abc import Iterator
from dataclasses import dataclass

from clear_dist.plan.request import Part, PlanRequest
from clear_dist.plan.step import FLOAT32

MAX_BYTES = {"cpu": 1 << 25, "cuda": 1 << 28}
"""Of the temporary tensors of a chunk; clear_dist/vae has the same."""
BYTES_PER_VALUE = 12
PICTURE_CHANNELS = 3


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer of the VAE with its input in one stripe, and with its size there."""

    inputs: int
    """Channels."""
    outputs: int
    rows: int
    """Of its input; pixels or latents."""
    columns: int
    kind: str = "convolution"
    """Or `resnet`, `head` (norm and convolution), `attention`."""
    zoom: float = 1
    """Rows and columns of its output, in those of its input."""


def decode_bytes(request: PlanRequest, part: Part) -> int:
    """Of a rank that decodes its stripe, where most is alive; the latents that it decodes not included."""
    return max(_layer_bytes(request, part, layer) for layer in decoder(request, part))


def encode_bytes(request: PlanRequest, part: Part) -> int:
    """Of a rank that encodes its stripe, its pixels included."""
    pixels = request.num_images * PICTURE_CHANNELS * part.tokens * request.model.token**2 * request.itemsize
    return pixels + max(_layer_bytes(request, part, layer) for layer in encoder(request, part))


def decoder(request: PlanRequest, part: Part) -> Iterator[Layer]:
    """The layers of a decode, in order."""
    vae, rows, columns = request.model.vae, *_latent_size(request, part)
    channels = vae.channels[-1]
    yield Layer(inputs=vae.latent_channels, outputs=channels, rows=rows, columns=columns)
    yield from _middle(request, channels, rows, columns)
    for index, outputs in enumerate(reversed(vae.channels)):
        for _ in range(vae.layers_per_block + 1):
            yield Layer(kind="resnet", inputs=channels, outputs=outputs, rows=rows, columns=columns)
            channels = outputs
        if index < len(vae.channels) - 1:
            yield Layer(inputs=channels, outputs=channels, rows=rows, columns=columns, zoom=2)
            rows, columns = 2 * rows, 2 * columns
    yield Layer(kind="head", inputs=channels, outputs=PICTURE_CHANNELS, rows=rows, columns=columns)


def encoder(request: PlanRequest, part: Part) -> Iterator[Layer]:
    """The layers of an encode, in order."""
    vae, rows, columns = request.model.vae, *_latent_size(request, part)
    scale = 2 ** (len(vae.channels) - 1)
    rows, columns, channels = rows * scale, columns * scale, vae.channels[0]
    yield Layer(inputs=PICTURE_CHANNELS, outputs=channels, rows=rows, columns=columns)
    for index, outputs in enumerate(vae.channels):
        for _ in range(vae.layers_per_block):
            yield Layer(kind="resnet", inputs=channels, outputs=outputs, rows=rows, columns=columns)
            channels = outputs
        if index < len(vae.channels) - 1:
            yield Layer(inputs=channels, outputs=channels, rows=rows, columns=columns, zoom=0.5)
            rows, columns = rows // 2, columns // 2
    yield from _middle(request, channels, rows, columns)
    yield Layer(kind="head", inputs=channels, outputs=2 * vae.latent_channels, rows=rows, columns=columns)


def _middle(request: PlanRequest, channels: int, rows: int, columns: int) -> Iterator[Layer]:
    kinds = ("resnet", "attention", "resnet") if request.model.vae.attention else ("resnet", "resnet")
    for kind in kinds:
        yield Layer(kind=kind, inputs=channels, outputs=channels, rows=rows, columns=columns)


def _latent_size(request: PlanRequest, part: Part) -> tuple[int, int]:
    """Rows and columns of latents in a stripe."""
    scale = request.model.token // 2 ** (len(request.model.vae.channels) - 1)
    return part.rows * scale, part.columns * scale


def _layer_bytes(request: PlanRequest, part: Part, layer: Layer) -> int:
    """Input, output and the temporary tensors of a chunk."""
    size, batch = request.itemsize, request.num_images
    held = layer.inputs * (layer.rows + 2) * layer.columns * batch * size
    if layer.kind == "attention":
        return held + _attention_bytes(request, part, layer)
    room = 3 if layer.kind == "resnet" else 2
    rows, columns = round(layer.rows * layer.zoom) + room, round(layer.columns * layer.zoom)
    return held + layer.outputs * rows * columns * batch * size + _chunk_bytes(request, layer)


def _chunk_bytes(request: PlanRequest, layer: Layer) -> int:
    """Of the temporary tensors of one chunk, and what is left of the one before."""
    size, row = request.itemsize, request.num_images * layer.columns
    zoom = max(1, round(layer.zoom))
    rows = _rows_of_chunk(request, layer, (layer.inputs + layer.outputs) * zoom**2)
    left = size * round(row * rows * layer.outputs * layer.zoom**2)
    convolved = max(
        _convolution_bytes(request, layer, rows),
        left + _convolution_bytes(request, layer, min(rows, layer.rows - rows)) if rows < layer.rows else 0,
    )
    if layer.kind == "convolution":
        return convolved
    # The moments of a group norm: values in float32, and once more, or those of the chunk before.
    copies = 2 if size < FLOAT32 else 1
    return max(convolved, row * _rows_of_chunk(request, layer, layer.inputs) * layer.inputs * copies * FLOAT32)


def _convolution_bytes(request: PlanRequest, layer: Layer, rows: int) -> int:
    """Of so many rows: the input after the norm, or enlarged; what the convolution makes of it; the shortcut."""
    size, row, zoom = request.itemsize, request.num_images * layer.columns, max(1, round(layer.zoom))
    values_in, values_out = row * (rows + 2) * layer.inputs, round(row * rows * layer.outputs * layer.zoom**2)
    if layer.kind == "convolution":
        return size * ((values_in * zoom**2 if zoom > 1 else 0) + values_out)
    shortcut = layer.kind == "resnet" and layer.inputs != layer.outputs
    normed = FLOAT32 + size if size < FLOAT32 else 2 * size
    return max(values_in * normed, size * (values_in + values_out * (1 + shortcut)))


def _rows_of_chunk(request: PlanRequest, layer: Layer, channels: int) -> int:
    most = MAX_BYTES["cuda" if request.on_cuda else "cpu"]
    values = request.num_images * layer.columns * channels * BYTES_PER_VALUE
    return min(max(1, most // values - 2), layer.rows)


def _attention_bytes(request: PlanRequest, part: Part, layer: Layer) -> int:
    """Mid-block attention: mine, normalised and projected; keys and values of the whole picture, and while gathered."""
    position = request.num_images * layer.inputs * request.itemsize
    mine, scale = layer.rows * layer.columns, layer.columns // part.columns
    whole = part.height * scale * layer.columns
    gathered = part.ranks * part.tallest * scale * layer.columns
    return position * (5 * mine + 2 * whole + gathered)
