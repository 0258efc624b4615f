"""Bytes that a rank hands over: in a step, and while the VAE works on its stripe."""

from collections.abc import Iterable
from dataclasses import dataclass

from clear_dist.options import Schedule
from clear_dist.plan.counts import Model, Traffic, traffic
from clear_dist.plan.counts import Part as Share
from clear_dist.plan.request import Part, PlanRequest, lags
from clear_dist.plan.vae import Layer, decoder, encoder
from clear_dist.stages import Stage


@dataclass(frozen=True, kw_only=True)
class VaeTraffic:
    """Bytes of one encode or decode on one rank."""

    rows_sent: int
    """Border rows, to both neighbours."""
    gathered: int
    """Keys and values of the middle block, that all get."""


def step_traffic(request: PlanRequest, stage: Stage, rank: int, part: Part) -> Traffic:
    """Of all passes of a step."""
    once = traffic(
        counted(request),
        share_of(request, stage, rank, part),
        schedule_of(request, stage, part),
        request.text_attention,
        request.text_sharding,
    )
    passes = stage.sampling.passes
    times = passes * request.num_images
    return Traffic(
        ranks=once.ranks,
        halos_sent=times * once.halos_sent,
        halos_received=times * once.halos_received,
        pooled_sent=times * once.pooled_sent,
        pooled_received=times * once.pooled_received,
        text_gathered=times * once.text_gathered,
        text_reduced=times * once.text_reduced,
        weights_sent=passes * request.weights.sent,  # all pictures of a pass together
        join=times * once.join,
    )


def counted(request: PlanRequest) -> Model:
    """The model as counts need it."""
    model = request.model
    return Model(
        double_blocks=model.double_blocks,
        single_blocks=model.single_blocks,
        heads=model.heads,
        head_dim=model.head_dim,
        text_tokens=request.text_tokens,
        itemsize=request.itemsize,
        output_channels=model.latent_channels,
    )


def share_of(request: PlanRequest, stage: Stage, rank: int, part: Part) -> Share:
    """A rank's part as counts need it."""
    return Share(
        grid=(part.height, part.columns),
        ranks=part.ranks,
        rank=rank,
        window=request.window,
        factor=request.down_factor,
    )


def schedule_of(request: PlanRequest, stage: Stage, part: Part) -> Schedule:
    """Of a stage: one that is all warm-up is in sync."""
    return "stale" if lags(request, stage, part.ranks) else "sync"


def decode_traffic(request: PlanRequest, part: Part) -> VaeTraffic:
    """Of a decode."""
    return _vae_traffic(request, part, decoder(request, part))


def encode_traffic(request: PlanRequest, part: Part) -> VaeTraffic:
    """Of an encode."""
    return _vae_traffic(request, part, encoder(request, part))


def _vae_traffic(request: PlanRequest, part: Part, layers: Iterable[Layer]) -> VaeTraffic:
    number = request.num_images * request.itemsize
    rows = gathered = 0
    for layer in layers:
        if layer.kind == "attention":
            gathered += 2 * layer.inputs * part.tallest * (layer.columns // part.columns) * layer.columns * number
        else:
            channels = layer.inputs + (layer.outputs if layer.kind == "resnet" else 0)
            rows += part.neighbours * channels * layer.columns * number
    return VaeTraffic(rows_sent=rows, gathered=gathered * (part.ranks > 1))
