"""How one image is cut over a group: its stripes, and what they exchange in every layer and once per step."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from clear_dist.attention import Backend
from clear_dist.clock import Clock
from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.comm.halo_exchange import HaloExchange
from clear_dist.comm.send_buffers import SendBuffers
from clear_dist.comm.stale_exchange import StaleHaloExchange, StaleTextReduce
from clear_dist.comm.stripe_join import StripeJoin
from clear_dist.comm.text_reduce import TextAttention, TextReduce
from clear_dist.config import Schedule
from clear_dist.geometry import HaloPlan, Rows, covering_radius, cut_in_stripes, plan_halos
from clear_dist.models.extrapolation import Extrapolation
from clear_dist.models.joint_attention import FullJointAttention, JointAttention, WindowJointAttention

SENDING_LAYERS = 8
"""How many layers' messages may be on their way out in the stale schedule: a link's latency, in layers."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """An image of `height` x `width` tokens on a group's stripes; it serves one such image after another."""

    height: int
    width: int
    group: Group
    extrapolation: Extrapolation | None
    stripes: tuple[Rows, ...]
    plan: HaloPlan
    stale: bool
    join: StripeJoin
    make_joint_attention: Callable[[], JointAttention]
    _made: dict[tuple[int, int], JointAttention] = field(default_factory=dict)

    @property
    def tokens(self) -> slice:
        """This rank's tokens in raster order."""
        return slice(self.plan.own.start * self.width, self.plan.own.stop * self.width)

    def serves(self, size: tuple[int, int], group: Group, extrapolation: Extrapolation | None) -> bool:
        """Whether it is what `cut_image` would make for these."""
        return (self.height, self.width) == size and self.group is group and self.extrapolation == extrapolation

    def joint_attention(self, turn: int, layer: int) -> JointAttention:
        """One for all layers; in the stale schedule each has its own in each pass, with what it holds of the others."""
        which = (turn, layer) if self.stale else (0, 0)
        if which not in self._made:
            self._made[which] = self.make_joint_attention()
        return self._made[which]

    def drain(self) -> None:
        """Nothing is on its way afterwards, and nothing of the images so far is left; all ranks call this."""
        for attention in self._made.values():
            attention.halos.drain()
            attention.text_reduce.drain()
        self._made.clear()

    def has_begun(self, turn: int) -> bool:
        """Whether buffers were made for this pass of the stale schedule."""
        return any(made == turn for made, _ in self._made)

    @property
    def stale_bytes(self) -> int:
        """Of the buffers that hold something from one step to the next."""
        if not self.stale:
            return 0
        return sum(made.halos.received_bytes + made.text_reduce.kept_bytes for made in self._made.values())


def cut_image(
    size: tuple[int, int],
    group: Group,
    extrapolation: Extrapolation | None,
    *,
    radius: int | None,
    text_attention: TextAttention,
    backend: Backend,
    schedule: Schedule,
    clock: Clock,
    counters: Counters,
) -> Cut:
    """Cuts an image for this rank; nothing is sent.

    Args:
        size: height and width in tokens.
        radius: in tokens; None: full attention.
        clock: what the stale schedule goes by.

    Raises:
        ValueError: there are more ranks than rows.
    """
    height, width = size
    stripes = cut_in_stripes(height, group.size)
    # A wider circle than the image holds the same keys.
    radius = radius and min(radius, covering_radius(height, width))
    plan = plan_halos(stripes, group.rank, radius)
    stale = schedule == "stale" and group.size > 1  # one rank waits for nobody
    sends = SendBuffers(group, counters, layers=SENDING_LAYERS if stale else 0)

    def make_joint_attention() -> JointAttention:
        halos = HaloExchange(group, plan, counters, sends=sends)
        text_reduce = TextReduce(group, text_attention, counters)
        if stale:
            halos = StaleHaloExchange(group, plan, counters, sends=sends, clock=clock)
            text_reduce = StaleTextReduce(group, text_attention, counters, clock=clock)
        shared: dict[str, Any] = {
            "plan": plan,
            "width": width,
            "halos": halos,
            "text_reduce": text_reduce,
            "counts_text_keys": text_attention == "average" or group.rank == 0,
            "extrapolation": extrapolation,
        }
        if radius is None:
            return FullJointAttention(**shared)
        return WindowJointAttention(grid=Rows(0, height), radius=radius, backend=backend, **shared)

    return Cut(
        height=height,
        width=width,
        group=group,
        extrapolation=extrapolation,
        stripes=stripes,
        plan=plan,
        stale=stale,
        join=StripeJoin(group, stripes, counters),
        make_joint_attention=make_joint_attention,
    )
