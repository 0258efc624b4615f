"""A pipeline on stripes, as `parallelize` returns it."""

from typing import Literal

from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.engine.striped import StripedModel
from clear_dist.options import TextAttention
from clear_dist.weights.blocks import weight_bytes
from clear_dist.weights.clear import ReplacedWeights
from clear_dist.weights.offload import Offloaded


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
        return self._striped.settings.options.radius or "full"

    @property
    def text_attention(self) -> TextAttention:
        return self._striped.settings.reduction.word

    @property
    def stale_buffer_bytes(self) -> int:
        """Of what this rank kept from one step to the next in the stale schedule, at most; see the README."""
        return sum(model.stale_bytes for model in (self._striped, *self._controlnets))

    @property
    def weight_bytes(self) -> int:
        """Of the transformer's weights that this rank holds on its device: its shards only, where they are sharded."""
        modulation = self._striped.modulation
        elsewhere = set() if modulation is None else modulation.weights
        return weight_bytes(self._striped.family.transformer, but=elsewhere)

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
