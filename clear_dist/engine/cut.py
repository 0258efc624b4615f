"""How one image is cut over a group: its stripes, and what they exchange in every layer and once per step."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clear_dist.comm.clock import Clock
from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.comm.rows import StripeJoin
from clear_dist.engine.exchanges import Exchanges
from clear_dist.engine.extrapolation import Extrapolation
from clear_dist.engine.joint_attention import FullJointAttention, JointAttention, WindowJointAttention
from clear_dist.engine.room import needed_bytes
from clear_dist.engine.settings import Settings
from clear_dist.geometry import (
    HaloPlan,
    Rows,
    TextPlan,
    covering_radius,
    cut_in_stripes,
    plan_halos,
    plan_pooled,
    plan_text,
    require_units,
    sharing_text_pays,
)
from clear_dist.options import TextTokens


@dataclass(frozen=True, kw_only=True)
class Cut:
    """An image of `height` x `width` tokens on a group's stripes; it serves one such image after another."""

    height: int
    width: int
    text_tokens: int
    """That its attention backend was chosen for."""
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

    def serves(
        self,
        size: tuple[int, int],
        group: Group,
        extrapolation: Extrapolation | None,
        *,
        text_tokens: int,
        stale: bool,
    ) -> bool:
        """Whether it is what `cut_image` would make for these."""
        mine = self.height, self.width, self.extrapolation, self.text_tokens, self.stale
        return self.group is group and (*size, extrapolation, text_tokens, stale) == mine


def plan_image(size: tuple[int, int], group: Group, radius: int | None, unit: int) -> tuple[tuple[Rows, ...], HaloPlan]:
    """All stripes of an image of `size` tokens, and the halos of this rank's; raises ValueError as `cut_image`."""
    stripes = cut_in_stripes(size[0], group.size, unit=unit)
    require_units("width", size[1], unit)
    return stripes, plan_halos(stripes, group.rank, radius)


def stale_bytes(size: tuple[int, int], group: Group, settings: Settings, *, row_bytes: int, layers: int) -> int:
    """Bytes that the stale schedule's buffers take on this rank, for an image of `size` tokens.

    Args:
        row_bytes: keys and values of a row of the grid.
        layers: in all passes of a step.
    """
    stripes, plan = plan_image(size, group, settings.options.radius, settings.unit)
    needed = needed_bytes(plan, row_bytes=row_bytes, layers=layers)
    if settings.pooling is not None:
        factor = settings.pooling.factor
        pooled = plan_pooled(stripes, group.rank, factor)
        needed += needed_bytes(pooled, row_bytes=row_bytes // factor, layers=layers)
    return needed


def largest_call(size: tuple[int, int], stripes: tuple[Rows, ...], radius: int) -> dict[str, int]:
    """Sizes that no call of any rank exceeds, for `choose_backend`; equal on all ranks, which so choose alike."""
    rows = max(map(len, stripes))
    # A halo has a call of its own; its rows of keys and one's own are no more than this.
    key_rows = min(size[0], rows + 2 * (radius - 1))
    return {"rows": rows, "key_rows": key_rows, "columns": size[1], "radius": radius}


def cut_image(
    size: tuple[int, int],
    group: Group,
    extrapolation: Extrapolation | None,
    settings: Settings,
    *,
    text_tokens: int,
    clock: Clock | None,
    counters: Counters,
) -> Cut:
    """Cuts an image for this rank; nothing is sent.

    Args:
        size: height and width in tokens.
        clock: what the stale schedule goes by; None: the sync schedule.

    Raises:
        ValueError: there are more ranks than rows, or units of rows; a side is no multiple of the unit; or the backend
            cannot serve this image.
    """
    height, width = size
    # A wider circle than the image holds the same keys.
    radius = settings.options.radius and min(settings.options.radius, covering_radius(height, width))
    stripes, plan = plan_image(size, group, radius, settings.unit)
    shared: dict[str, Any] = {
        "plan": plan,
        "width": width,
        "counts_text_keys": settings.reduction.counts_text_keys(group.rank),
        "extrapolation": extrapolation,
    }
    joint_attention: JointAttention = FullJointAttention(**shared)
    if radius is not None:
        backend = settings.choose_backend(**largest_call(size, stripes, radius), text=text_tokens)
        joint_attention = WindowJointAttention(grid=Rows(0, height), radius=radius, backend=backend, **shared)
    return Cut(
        height=height,
        width=width,
        text_tokens=text_tokens,
        group=group,
        extrapolation=extrapolation,
        stale=clock is not None,
        stripes=stripes,
        plan=plan,
        joint_attention=joint_attention,
        exchanges=Exchanges(group, stripes, plan, settings, counters, clock=clock),
        join=StripeJoin(group, stripes, counters),
    )


def others_first(x_BT: Tensor, text: TextPlan) -> Tensor:
    """`x`, one entry for each text token, in the order of `Heads`: other ranks' tokens, then mine."""
    own = text.own
    return torch.cat([x_BT[:, : own.start], x_BT[:, own.stop :], x_BT[:, own]], dim=1)


def choose_text_plan(asked: TextTokens, text_tokens: int, cut: Cut) -> TextPlan:
    """The text tokens that this rank takes through the blocks; `auto` decides from what is equal on all ranks."""
    group = cut.group
    # The stale schedule and transport through host memory are for slow links, where work is cheaper than messages.
    fast = group.transport != "host" and not cut.stale
    pays = fast and sharing_text_pays(text_tokens, cut.height * cut.width, group.size)
    if asked == "sharded" or (asked == "auto" and pays):
        return plan_text(text_tokens, group.size, group.rank)
    return plan_text(text_tokens, 1, 0)
