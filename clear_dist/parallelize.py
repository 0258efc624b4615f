"""Puts a stock diffusers pipeline on stripes, and takes it off again."""

from collections.abc import Callable
from functools import partial
from operator import index
from pathlib import Path
from typing import Any, Literal

import torch

from clear_dist.attention import Backend, choose_backend
from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.comm.text_reduce import TextAttention
from clear_dist.config import Schedule
from clear_dist.config.rules import SCHEDULES, WARMUP_STEPS
from clear_dist.models import adaptor_for
from clear_dist.models.agreement import checksum
from clear_dist.models.float8 import why_not as why_not_float8
from clear_dist.models.striped import StripedModel
from clear_dist.models.weights import load_clear_weights, radius_of
from clear_dist.preflight.devices import missing_compiler


class Parallelized:
    """A pipeline on stripes: what it runs on, what it has counted, and the way back."""

    def __init__(self, striped: StripedModel, *, owns_group: bool) -> None:
        self._striped = striped
        self._owns_group = owns_group

    @property
    def group(self) -> Group:
        return self._striped.group

    @property
    def counters(self) -> Counters:
        return self._striped.counters

    @property
    def window(self) -> int | Literal["full"]:
        """Radius in tokens, or `full`."""
        return self._striped.radius or "full"

    @property
    def text_attention(self) -> TextAttention:
        return self._striped.text_attention

    @property
    def stale_buffer_bytes(self) -> int:
        """Of what this rank kept from one step to the next in the stale schedule, at most; see the README."""
        return self._striped.stale_bytes

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
        self._striped.drain()

    def undo(self) -> None:
        """Restores processors, hooks and where weights are. Weights that a CLEAR checkpoint replaced stay replaced."""
        self._striped.remove()
        if self._owns_group:
            self.group.close()
            self._owns_group = False


def parallelize(
    pipe: Any,
    *,
    window: int | Literal["full"] | None = None,
    clear_weights: str | Path | None = None,
    text_attention: TextAttention | None = None,
    attention_backend: str = "auto",
    schedule: Schedule = "sync",
    warmup_steps: int = WARMUP_STEPS,
    hoist_modulation: bool = False,
    compile: bool = False,
    float8: bool = False,
    group: Group | None = None,
) -> Parallelized:
    """Cuts the transformer of `pipe` in stripes, one per rank; all else stays diffusers'.

    Call it on every rank, then use the pipeline as ever, with equal arguments and equally seeded generators.

    Args:
        pipe: a diffusers pipeline with a FLUX transformer, on the device where it is to run.
        window: radius in tokens of what an image token sees, or `full`; by default the checkpoint's, else `full`.
        clear_weights: a CLEAR checkpoint; without one a window draws noise, unless `pipe` was trained with it.
        text_attention: `average` (Eq. 7 of the paper, the default) or `exact`: N ranks compute what one computes.
        attention_backend: a row of `clear_dist.attention.BACKENDS`; `auto`: the fastest for each image, as measured.
        schedule: `sync`: this step's halos; `stale`: those of the step before, for slow links (README).
        warmup_steps: of `stale`: the steps at the start of each generation that are synchronous all the same.
        hoist_modulation: keep AdaLN's weights in host memory: the same bits from less on the device (README).
        compile: fuse what lies between a block's matrix products; the first step waits for the compiler (README).
        float8: quantise the blocks' linear layers for good, on GPUs that can (README); LoRA comes after.
        group: the ranks that share an image; by default all of torch.distributed's, without it this process alone.

    Raises:
        ValueError: an argument is wrong or differs between ranks, or the pipeline's transformer cannot be cut.
    """
    transformer: Any = getattr(pipe, "transformer", None)
    adaptor = adaptor_for(transformer)
    require_stock(pipe)
    radius = checked_radius(window, clear_weights)
    settings = checked_schedule(schedule, warmup_steps)
    settings |= {"text_attention": checked_text_attention(text_attention, radius), "hoist_modulation": hoist_modulation}
    device = pipe._execution_device  # where it runs, also if its parts are offloaded to the CPU meanwhile
    settings |= checked_kernels(compile, float8, device, transformer.dtype)
    choose = checked_backend(attention_backend, device, transformer.dtype, adaptor.head_dim)
    group_or_own = group or Group.create(device)
    replaced = load_clear_weights(transformer, clear_weights) if clear_weights is not None else []
    weights = [checksum(transformer.get_parameter(name)) for name in replaced]
    chosen = {"window": radius or "full", "attention_backend": choose().name, "dtype": transformer.dtype}
    require_equal_settings(group_or_own, **chosen, clear_weights=weights, **settings)
    striped = StripedModel(adaptor, pipe.scheduler, group_or_own, radius=radius, choose_backend=choose, **settings)
    return Parallelized(striped, owns_group=group is None)


def require_stock(pipe: Any) -> None:
    """Raises ValueError where the transformer is on stripes already, or its projections are fused."""
    if striped_of(pipe) is not None:
        raise ValueError("this pipeline is parallelized already; undo() the former first")
    if any(getattr(module, "fused_projections", False) for module in pipe.transformer.modules()):
        raise ValueError("fused projections cannot be cut; call pipe.transformer.unfuse_qkv_projections() first")


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


def checked_radius(window: int | str | None, clear_weights: str | Path | None) -> int | None:
    if window is None:
        return radius_of(clear_weights) if clear_weights is not None else None
    if window == "full":
        return None
    if isinstance(window, bool | str) or not hasattr(window, "__index__") or window < 1:
        raise ValueError(f"window must be a radius of at least 1 token or 'full', got {window!r}; nearest: 1")
    return index(window)


def checked_backend(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Callable[..., Backend]:
    """`choose_backend` with all but sizes given; raises ValueError where there is no such backend for any image."""
    choose = partial(choose_backend, name, device=device, dtype=dtype, head_dim=head_dim)
    choose()
    return choose


def checked_schedule(schedule: Schedule, warmup_steps: int) -> dict[str, Any]:
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be 'sync' or 'stale', got {schedule!r}")
    if isinstance(warmup_steps, bool) or not hasattr(warmup_steps, "__index__") or warmup_steps < 0:
        raise ValueError(f"warmup_steps must be a whole number of at least 0, got {warmup_steps!r}; nearest: 0")
    return {"schedule": schedule, "warmup_steps": index(warmup_steps)}


def checked_kernels(compile: bool, float8: bool, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    if compile and (missing := missing_compiler(device.type)):
        raise ValueError(f"compile needs {missing}, got none; nearest: compile=False")
    if float8 and (needed := why_not_float8(device, dtype)):
        raise ValueError(f"float8 needs {needed}; nearest: float8=False")
    return {"compile": compile, "float8": float8}


def checked_text_attention(text_attention: TextAttention | None, radius: int | None) -> TextAttention:
    if text_attention not in (None, "average", "exact"):
        raise ValueError(f"text_attention must be 'average' or 'exact', got {text_attention!r}")
    if radius is None and text_attention == "average":
        raise ValueError("text_attention must be 'exact' where window is 'full', got 'average'; nearest: 'exact'")
    return text_attention or ("average" if radius is not None else "exact")
