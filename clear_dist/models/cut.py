"""How one image is cut over a group: its stripes, and what they exchange in every layer and once per step."""

from dataclasses import dataclass
from typing import Any

from clear_dist.attention import Backend
from clear_dist.clock import Clock
from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.comm.stripe_join import StripeJoin
from clear_dist.comm.text_reduce import TextAttention
from clear_dist.geometry import (
    HaloPlan,
    Rows,
    covering_radius,
    cut_in_stripes,
    plan_halos,
    plan_pooled,
    require_units,
)
from clear_dist.models.exchanges import Exchanges
from clear_dist.models.extrapolation import Extrapolation
from clear_dist.models.joint_attention import FullJointAttention, JointAttention, WindowJointAttention
from clear_dist.models.pooled_keys import Pooling


@dataclass(frozen=True, kw_only=True)
class Cut:
    """An image of `height` x `width` tokens on a group's stripes; it serves one such image after another."""

    height: int
    width: int
    group: Group
    extrapolation: Extrapolation | None
    stale: bool
    """Whether its exchanges are those of the stale schedule."""
    stripes: tuple[Rows, ...]
    plan: HaloPlan
    joint_attention: JointAttention
    exchanges: Exchanges
    join: StripeJoin

    @property
    def tokens(self) -> slice:
        """This rank's tokens in raster order."""
        return slice(self.plan.own.start * self.width, self.plan.own.stop * self.width)

    def serves(self, size: tuple[int, int], group: Group, extrapolation: Extrapolation | None, *, stale: bool) -> bool:
        """Whether it is what `cut_image` would make for these."""
        image, mine = (*size, extrapolation, stale), (self.height, self.width, self.extrapolation, self.stale)
        return self.group is group and image == mine


def plan_image(
    size: tuple[int, int], group: Group, radius: int | None, down_factor: int
) -> tuple[tuple[Rows, ...], HaloPlan, HaloPlan | None]:
    """All stripes of an image of `size` tokens, the halos of this rank's, and its exchange of down-sampled rows.

    Args:
        down_factor: 1: nothing is down-sampled, and the last one is None.

    Raises:
        ValueError: as `cut_image`.
    """
    stripes = cut_in_stripes(size[0], group.size, unit=down_factor)
    require_units("width", size[1], down_factor)
    pooled = plan_pooled(stripes, group.rank, down_factor) if down_factor > 1 else None
    return stripes, plan_halos(stripes, group.rank, radius), pooled


def cut_image(
    size: tuple[int, int],
    group: Group,
    extrapolation: Extrapolation | None,
    *,
    radius: int | None,
    text_attention: TextAttention,
    backend: Backend,
    clock: Clock | None,
    counters: Counters,
    pooling: Pooling | None = None,
) -> Cut:
    """Cuts an image for this rank; nothing is sent.

    Args:
        size: height and width in tokens.
        radius: in tokens; None: full attention.
        clock: what the stale schedule goes by; None: the sync schedule.
        pooling: of down-sampled keys, for a window only.

    Raises:
        ValueError: there are more ranks than rows, or units of rows; or a side is no multiple of the pooling's factor.
    """
    height, width = size
    # A wider circle than the image holds the same keys.
    radius = radius and min(radius, covering_radius(height, width))
    stripes, plan, pooled = plan_image(size, group, radius, 1 if pooling is None else pooling.factor)
    shared: dict[str, Any] = {
        "plan": plan,
        "width": width,
        "counts_text_keys": text_attention == "average" or group.rank == 0,
        "extrapolation": extrapolation,
    }
    joint_attention: JointAttention = FullJointAttention(**shared)
    if radius is not None:
        joint_attention = WindowJointAttention(grid=Rows(0, height), radius=radius, backend=backend, **shared)
    return Cut(
        height=height,
        width=width,
        group=group,
        extrapolation=extrapolation,
        stale=clock is not None,
        stripes=stripes,
        plan=plan,
        joint_attention=joint_attention,
        exchanges=Exchanges(group, plan, text_attention, counters, clock=clock, pooling=pooling, pooled_plan=pooled),
        join=StripeJoin(group, stripes, counters),
    )
