"""Puts a stock diffusers pipeline on stripes, and takes it off again."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from clear_dist.arguments import (
    checked_backend,
    checked_schedule,
    checked_text,
    checked_weights,
    checked_windows,
)
from clear_dist.attention import Backend
from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.comm.text_reduce import TextAttention
from clear_dist.config import Schedule, TextTokens
from clear_dist.config.rules import WARMUP_STEPS
from clear_dist.models import adaptor_for
from clear_dist.models.adaptor import Adaptor
from clear_dist.models.fitting import require_quantisable
from clear_dist.models.flux_controlnet import FluxControlNetAdaptor, controlnets_of, stripe_controlnet
from clear_dist.models.settings import Settings
from clear_dist.models.stock import require_stock
from clear_dist.models.striped import StripedModel
from clear_dist.models.weights import ReplacedWeights, load_clear_weights
from clear_dist.offload import Offloaded


class Parallelized:
    """A pipeline on stripes: what it runs on, what it has counted, and the way back."""

    def __init__(
        self,
        striped: StripedModel,
        *controlnets: StripedModel,
        owns_group: bool,
        replaced: ReplacedWeights | None = None,
        offloaded: Offloaded | None = None,
    ) -> None:
        self._striped = striped
        self._controlnets = controlnets
        self._owns_group = owns_group
        self.replaced = replaced
        """What a CLEAR checkpoint has replaced."""
        self._offloaded = offloaded

    @property
    def group(self) -> Group:
        return self._striped.group

    @property
    def counters(self) -> Counters:
        """Of the transformer."""
        return self._striped.counters

    @property
    def controlnet_counters(self) -> list[Counters]:
        """Of each ControlNet, in the pipeline's order."""
        return [controlnet.counters for controlnet in self._controlnets]

    @property
    def window(self) -> int | Literal["full"]:
        """Radius in tokens, or `full`."""
        return self._striped.settings.radius or "full"

    @property
    def text_attention(self) -> TextAttention:
        return self._striped.settings.text_attention

    @property
    def stale_buffer_bytes(self) -> int:
        """Of what this rank kept from one step to the next in the stale schedule, at most; see the README."""
        return sum(model.stale_bytes for model in (self._striped, *self._controlnets))

    @property
    def weight_bytes(self) -> int:
        """Of the transformer's weights that this rank holds on its device: its shards only, where they are sharded."""
        return self._striped.weight_bytes

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width in tokens of the last image."""
        assert self._striped.cut is not None, "known once a forward has run"
        return self._striped.cut.height, self._striped.cut.width

    @property
    def stripes(self) -> list[tuple[int, int]]:
        """Rows [start, stop) of each rank for the last image."""
        assert self._striped.cut is not None, "known once a forward has run"
        return [(rows.start, rows.stop) for rows in self._striped.cut.stripes]

    def require_room(self, height: int, width: int, *, steps: int, batch: int = 1, passes: int = 1) -> None:
        """Whether the stale schedule's buffers fit for images of so many tokens; every rank calls this, or none.

        Args:
            steps: of the generation; one that is all warm-up needs no buffers.
            passes: through the transformer in each step; classifier-free guidance takes two.

        Raises:
            ValueError: on all ranks, where they do not. Generations raise it too, when they begin.
        """
        self._striped.require_room((height, width), batch=batch, passes=passes, steps=steps)

    def drain(self) -> None:
        """Waits for what the stale schedule has on its way, as the next generation would; every rank calls this."""
        for model in (self._striped, *self._controlnets):
            model.drain()

    def undo(self) -> None:
        """Restores processors, hooks and where weights are.

        Weights that a CLEAR checkpoint replaced stay replaced; down-sampled keys that came with it go. Weights in
        shards are gathered: all ranks call this, and each must have the memory for all of them.
        """
        for model in (*self._controlnets, self._striped):
            model.remove()
        if self._offloaded is not None:
            self._offloaded.remove()
        if self._owns_group:
            self.group.close()
            self._owns_group = False

    def close(self) -> None:
        """What the ranks share ends with the program; nothing is restored, the pipeline is of no use afterwards."""
        for model in (self._striped, *self._controlnets):
            for shards in model.shards:
                shards.close()
        if self._owns_group:
            self.group.close()


def parallelize(
    pipe: Any, *, window: int | Literal["full"] | None = None, controlnet_window: int | Literal["full"] | None = None,
    clear_weights: str | Path | None = None, text_attention: TextAttention | None = None,
    text_tokens: TextTokens = "auto", attention_backend: str = "auto", schedule: Schedule = "sync",
    warmup_steps: int = WARMUP_STEPS, hoist_modulation: bool = False, compile: bool = False, float8: bool = False,
    int8: bool = False, shard_weights: bool = False, offload: bool = False, group: Group | None = None,
) -> Parallelized:  # fmt: skip
    """Cuts the transformer of `pipe`, and its ControlNets, in stripes, one per rank; all else stays diffusers'.

    Call it on every rank, then use the pipeline as ever, with equal arguments and equally seeded generators.

    Args:
        pipe: a diffusers pipeline with a FLUX transformer, on the device where it is to run.
        window: radius in tokens of what an image token sees, or `full`; by default the checkpoint's, else `full`.
        controlnet_window: of ControlNets, which CLEAR has not distilled; by default the transformer's.
        clear_weights: a CLEAR checkpoint; without one a window draws noise, unless `pipe` was trained with it.
        text_attention: `average` (Eq. 7 of the paper, the default) or `exact`: N ranks compute what one computes.
        text_tokens: `sharded`: each takes a share of them through the blocks; `replicated`; `auto`: by sizes (README).
        attention_backend: a row of `clear_dist.attention.BACKENDS`; `auto`: the fastest for each image, as measured.
        schedule: `stale`: halos of the step before, but for `warmup_steps` at the start; for slow links (README).
        hoist_modulation: keep AdaLN's weights in host memory: the same bits from less on the device (README).
        compile: fuse what lies between a block's matrix products; the first step waits for the compiler (README).
        float8, int8: quantise the blocks' linear layers for good, on GPUs that can or anywhere; LoRA comes after.
        shard_weights: each rank holds a share of every block; the transformer may still be in host memory (README).
        offload: text encoders and VAE stay in host memory and come to the device to be used.
        group: the ranks that share an image; by default all of torch.distributed's, without it this process alone.

    Raises:
        ValueError: an argument is wrong or differs between ranks, or the pipeline's transformer cannot be cut.
    """
    adaptor, nets = adaptor_for(getattr(pipe, "transformer", None)), controlnets_of(pipe)
    require_stock(adaptor.transformer, *nets)
    radii = checked_windows(window, controlnet_window, clear_weights)
    device = group.device if group is not None else pipe._execution_device  # also where its parts are on the host
    given = checked_schedule(schedule, warmup_steps) | checked_text(text_attention, text_tokens, radii[0], schedule)
    dtype = adaptor.transformer.dtype
    weights = {"float8": float8, "int8": int8, "shard_weights": shard_weights, "hoist_modulation": hoist_modulation}
    given |= checked_weights(**weights, compile=compile, device=device, dtype=dtype)
    choose = checked_backend(attention_backend, device, dtype, adaptor.head_dim)
    require_quantisable(adaptor, *map(FluxControlNetAdaptor, nets), float8=float8, int8=int8)
    with on_refusal() as undo:
        offloaded = Offloaded(pipe, device) if offload else None
        undo += [] if offloaded is None else [offloaded.remove]
        used = group or Group.create(device)
        undo += [used.close] if group is None else []
        models, replaced = put_on_stripes(pipe, adaptor, nets, used, clear_weights, radii, choose, given)
    return Parallelized(*models, owns_group=group is None, replaced=replaced, offloaded=offloaded)


@contextmanager
def on_refusal() -> Iterator[list[Callable[[], None]]]:
    """Calls what has been put in the list, the last first, where a ValueError ends what is inside."""
    undo: list[Callable[[], None]] = []
    try:
        yield undo
    except ValueError:  # and nothing else: after a lost peer no group can be closed
        for step in reversed(undo):
            step()
        raise


def put_on_stripes(
    pipe: Any,
    adaptor: Adaptor,
    nets: Sequence[Any],
    group: Group,
    clear_weights: str | Path | None,
    radii: tuple[int | None, int | None],
    choose_backend: Callable[..., Backend],
    given: dict[str, Any],
) -> tuple[list[StripedModel], ReplacedWeights | None]:
    """The transformer and its ControlNets, or none of them where one refuses; and what CLEAR's weights have replaced.

    Args:
        radii: of the transformer and of the ControlNets.
        given: the other settings, as given to `parallelize`.
    """
    transformer, (radius, net_radius) = adaptor.transformer, radii
    replaced = None if clear_weights is None else load_clear_weights(transformer, clear_weights, group.device)
    chosen = {"window": radius or "full", "attention_backend": choose_backend().name, "dtype": transformer.dtype}
    chosen |= {"clear_weights": replaced and replaced.checksums(transformer)}
    chosen |= {"ControlNets' windows": [net_radius] * len(nets)}
    require_equal_settings(group, **chosen, **given)
    pooling = None if replaced is None or radius is None else replaced.pooling
    unit = 1 if pooling is None else pooling.factor
    settings = Settings(radius=radius, choose_backend=choose_backend, pooling=pooling, unit=unit, **given)
    with on_refusal() as undo:
        models = [StripedModel(adaptor, pipe.scheduler, group, settings)]
        undo.append(models[0].remove)
        for net in nets:
            models.append(stripe_controlnet(net, pipe.scheduler, group, settings, radius=net_radius))
            undo.append(models[-1].remove)
    return models, replaced


def require_equal_settings(group: Group, **settings: Any) -> None:
    """Raises ValueError on all ranks, where they were given different arguments: each would cut its own way."""
    everyone = group.gather_objects(settings)
    for name in settings:
        values = [theirs[name] for theirs in everyone]
        if any(value != values[0] for value in values):
            shown = "different files" if name == "clear_weights" else ", ".join(map(str, values))
            raise ValueError(f"{name} must be the same on all ranks, got {shown}")


def interrupt(pipe: Any, when: bool = True) -> bool:
    """Stops a generation after the step at hand, on all ranks, if `when` is true on any of them.

    Ranks that decided alone would wait for each other for ever: call this on every rank at the same step, from
    `callback_on_step_end`. Returns what was decided.
    """
    striped = striped_of(pipe)
    stop = striped.group.agree(when) if striped is not None else when
    if stop:  # the pipeline's loop asks for it before each step
        pipe._interrupt = True
    return stop


def striped_of(pipe: Any) -> StripedModel | None:
    """What `parallelize` put on the pipeline's transformer; shared by pipelines made with `from_pipe`."""
    processor = next(iter(pipe.transformer.attn_processors.values()))
    return getattr(processor, "striped", None)


def require_striped(pipe: Any) -> StripedModel:
    """As `striped_of`; raises ValueError where there is none."""
    striped = striped_of(pipe)
    if striped is None:
        raise ValueError("the pipeline must be on stripes: call clear_dist.parallelize(pipe) first")
    return striped
