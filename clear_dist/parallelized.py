"""Pipelines on stripes, as `parallelize` returns them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group, close
from clear_dist.engine.striped import StripedModel
from clear_dist.options import TextAttention
from clear_dist.weights.blocks import tensors_of
from clear_dist.weights.clear import ReplacedWeights
from clear_dist.weights.offload import Offloaded


@dataclass(eq=False)
class Parallelized:
    """A pipeline on stripes: its group, its counters, and the way back."""

    _striped: StripedModel
    _controlnets: Sequence[StripedModel]
    _own_groups: list[Group]
    replaced: ReplacedWeights | None
    _offloaded: Offloaded | None

    @property
    def group(self) -> Group:
        return self._striped.group

    @property
    def counters(self) -> Counters:
        return self._striped.counters

    @property
    def controlnet_counters(self) -> list[Counters]:
        """Counters of each ControlNet, in the pipeline's order."""
        return [controlnet.counters for controlnet in self._controlnets]

    @property
    def window(self) -> int | Literal["full"]:
        """Radius in tokens, or `full`."""
        return self._striped.settings.options.radius or "full"

    @property
    def text_attention(self) -> TextAttention:
        return self._striped.settings.reduction.word

    @property
    def stale_buffer_bytes(self) -> int:
        """Most bytes kept between steps of the stale schedule, on this rank (`docs/slow_links.md`)."""
        return sum(model.stale_bytes for model in (self._striped, *self._controlnets))

    @property
    def weight_bytes(self) -> int:
        """Bytes of the transformer's weights, or of its shards, on this rank's device."""
        modulation = self._striped.modulation
        elsewhere = set() if modulation is None else modulation.weights
        mine: list[Any] = [held for held in tensors_of(self._striped.family.transformer) if held not in elsewhere]
        return sum((held.to_local() if hasattr(held, "to_local") else held).nbytes for held in mine)

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the last image in tokens."""
        assert self._striped.cut is not None, "known once a forward has run"
        return self._striped.cut.size

    @property
    def stripes(self) -> list[tuple[int, int]]:
        """Rows or columns (`cut`) [start, stop) of each rank for the last image; of a half's, where halves guide."""
        assert self._striped.cut is not None, "known once a forward has run"
        return [(rows.start, rows.stop) for rows in self._striped.cut.stripes]

    @property
    def cut(self) -> Literal["rows", "columns"]:
        """What the stripes of the last image are runs of."""
        assert self._striped.cut is not None, "known once a forward has run"
        return "columns" if self._striped.cut.by_columns else "rows"

    @property
    def last_image(self) -> dict[str, Any]:
        """What a report tells of the last image, in plain JSON values: how it was cut, and steps that were left out."""
        stripes = [list(stripe) for stripe in self.stripes]
        return {"grid": list(self.grid), "cut": self.cut, "stripes": stripes, "skipped_steps": self.skipped_steps}

    @property
    def skipped_steps(self) -> list[int]:
        """Steps of the last generation, from 0, of which a cache left out a pass of this rank's."""
        return list(self._striped.cache.skipped)

    def require_room(self, height: int, width: int, *, steps: int, batch: int = 1, passes: int = 1) -> None:
        """All ranks call this; raises ValueError on all where stale buffers for so many tokens would not fit."""
        self._striped.require_room((height, width), batch=batch, passes=passes, steps=steps)

    def drain(self) -> None:
        """Wait for the stale schedule's messages, as the next generation would; every rank calls this."""
        for model in (self._striped, *self._controlnets):
            model.drain()

    def undo(self) -> None:
        """Restore processors, hooks and the places of weights; all ranks call this.

        A CLEAR checkpoint's weights stay, its down-sampled keys go; shards are gathered: each rank needs room for all.
        Torch.distributed, where it was initialised here for several ranks, stays so: the next time they meet over it.
        """
        for model in (*self._controlnets, self._striped):
            model.remove()
        if self._offloaded is not None:
            self._offloaded.remove()
        close(self._own_groups, self.group)

    def close(self) -> None:
        """End all that ranks share; the pipeline is of no use afterwards."""
        for model in (self._striped, *self._controlnets):
            model.graphs.drop()  # of a generation that was stopped; NCCL waits for all that hold its messages
            for shards in model.shards:
                shards.close()
        close(self._own_groups, self.group)
