"""One image cut over a group: its stripes, and what they exchange."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clear_dist import geometry
from clear_dist.comm.clock import Clock
from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.comm.rows import StripeJoin
from clear_dist.engine.exchanges import Exchanges
from clear_dist.engine.extrapolation import Extrapolation
from clear_dist.engine.joint_attention import FullJointAttention, JointAttention, WindowJointAttention
from clear_dist.engine.room import needed_bytes
from clear_dist.engine.settings import Settings
from clear_dist.geometry import HaloPlan, Rows, TextPlan
from clear_dist.options import TextTokens


@dataclass(frozen=True, kw_only=True)
class Cut:
    """An image of `height` x `width` tokens on a group's stripes, reused for further images of its size."""

    height: int
    width: int
    made_for: tuple[object, ...]
    """Size, extrapolation, text tokens, whether stale: it serves all images of the group for which these are equal."""
    group: Group
    extrapolation: Extrapolation | None
    stale: bool
    stripes: tuple[Rows, ...]
    plan: HaloPlan
    joint_attention: JointAttention
    exchanges: Exchanges
    join: StripeJoin

    @property
    def tokens(self) -> slice:
        """This rank's tokens in raster order."""
        return slice(self.plan.own.start * self.width, self.plan.own.stop * self.width)


def plan_image(size: tuple[int, int], group: Group, radius: int | None, unit: int) -> tuple[tuple[Rows, ...], HaloPlan]:
    """All stripes of an image of `size` tokens, and this rank's halos; raises as `cut_image`."""
    stripes = geometry.cut_in_stripes(size[0], group.size, unit=unit)
    geometry.require_units("width", size[1], unit)
    return stripes, geometry.plan_halos(stripes, group.rank, radius)


def stale_bytes(size: tuple[int, int], group: Group, settings: Settings, *, row_bytes: int, layers: int) -> int:
    """Bytes of the stale schedule's buffers on this rank, as in `halo_bytes_kept`, for an image of `size` tokens."""
    stripes, plan = plan_image(size, group, settings.options.radius, settings.unit)
    needed = needed_bytes(plan, row_bytes=row_bytes, layers=layers)
    if settings.pooling is not None:
        pooled = geometry.plan_pooled(stripes, group.rank, settings.unit)
        needed += needed_bytes(pooled, row_bytes=row_bytes // settings.unit, layers=layers)
    return needed


def largest_call(size: tuple[int, int], stripes: tuple[Rows, ...], radius: int) -> dict[str, int]:
    """Bounds of any rank's attention calls, equal on all ranks so that all choose one backend."""
    rows = max(map(len, stripes))
    # Own rows and each halo have a call of their own, with no more rows of keys than this.
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
    """Cut an image of `size` tokens for this rank, nothing sent; without a clock for the sync schedule.

    Raises ValueError for more ranks than units of rows, a side that is no multiple of the unit, or no backend.
    """
    height, width = size
    # A wider circle than the image holds the same keys.
    radius = settings.options.radius and min(settings.options.radius, geometry.covering_radius(height, width))
    stripes, plan = plan_image(size, group, radius, settings.unit)
    shared: dict[str, Any] = {
        "plan": plan,
        "grid": Rows(0, height),
        "width": width,
        "counts_text_keys": settings.reduction.counts_text_keys(group.rank),
        "extrapolation": extrapolation,
    }
    joint_attention: JointAttention = FullJointAttention(**shared)
    if radius is not None:
        backend = settings.choose_backend(**largest_call(size, stripes, radius), text=text_tokens)
        joint_attention = WindowJointAttention(radius=radius, backend=backend, **shared)
    return Cut(
        height=height,
        width=width,
        made_for=(size, extrapolation, text_tokens, clock is not None),
        group=group,
        extrapolation=extrapolation,
        stale=clock is not None,
        stripes=stripes,
        plan=plan,
        joint_attention=joint_attention,
        exchanges=Exchanges(group, stripes, plan, settings, counters, clock),
        join=StripeJoin(group, stripes, counters),
    )


def others_first(x_BT: Tensor, text: TextPlan) -> Tensor:
    """`x_BT`, one entry per text token, in the order of `Heads`: other ranks' tokens, then mine."""
    own = text.own
    return torch.cat([x_BT[:, : own.start], x_BT[:, own.stop :], x_BT[:, own]], dim=1)


def choose_text_plan(asked: TextTokens, text_tokens: int, cut: Cut) -> TextPlan:
    """Text tokens that this rank takes through the blocks; `auto` decides from what is equal on all ranks."""
    group = cut.group
    # The stale schedule and transport through host memory are for slow links, where work is cheaper than messages.
    fast = group.transport != "host" and not cut.stale
    pays = fast and geometry.sharing_text_pays(text_tokens, cut.height * cut.width, group.size)
    if asked == "sharded" or (asked == "auto" and pays):
        return geometry.plan_text(text_tokens, group.size, group.rank)
    return geometry.plan_text(text_tokens, 1, 0)


def joined_rows(mine_BCRW: Tensor, cut: Cut, packing: int) -> Tensor:
    """Latents of the whole image [B, C, H, W]; a row of tokens, `packing` of latents, travels in one piece."""
    rows = mine_BCRW.unflatten(2, (-1, packing)).transpose(1, 2)
    whole = cut.join.join(rows.flatten(2).contiguous())
    return whole.unflatten(2, rows.shape[2:]).transpose(1, 2).flatten(2, 3)
