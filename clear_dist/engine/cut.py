"""One image cut over a group: its stripes, and what they exchange.

Stripes are runs of rows. An image that is cut by columns is transposed where it is cut, token by token, and back where
it is joined: the window is a circle, so that nothing in between need know.
"""

from dataclasses import dataclass, replace
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
from clear_dist.engine.text_copies import Copies, Place
from clear_dist.geometry import HaloPlan, Rows, Striping, TextPlan
from clear_dist.options import TextTokens


@dataclass(frozen=True, kw_only=True)
class Cut:
    """An image of `height` x `width` tokens on a group's stripes, reused for further images of its size.

    By columns, it is the transposed image; only `size` is the image's own.
    """

    height: int
    width: int
    by_columns: bool
    made_for: tuple[object, ...]
    """Size, extrapolation, text tokens, whether stale: it serves all images of the group for which these are equal."""
    group: Group
    extrapolation: Extrapolation | None
    stale: bool
    stripes: tuple[Rows, ...]
    plan: HaloPlan
    copies: Copies
    joint_attention: JointAttention
    exchanges: Exchanges
    join: StripeJoin

    @property
    def size(self) -> tuple[int, int]:
        return (self.width, self.height) if self.by_columns else (self.height, self.width)

    @property
    def text_places(self) -> list[Place]:
        """Where each copy of the text begins that this rank holds, in the picture's own position ids."""
        scale = 1.0 if self.extrapolation is None else self.extrapolation.position_scale
        starts = [(scale * block.rows.start, scale * block.columns.start) for block in self.copies.blocks]
        return [(column, row) for row, column in starts] if self.by_columns else starts

    def most_tokens(self, text_tokens: int) -> int:
        """Tokens in the blocks of the rank that has most, where none shares its text."""
        return max(map(len, self.stripes)) * self.width + self.copies.most * text_tokens

    def own_tokens(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's entries of `x`, whose dimension `dim` begins with one per token of the image in raster order."""
        if not self.by_columns:
            return x.narrow(dim, self.plan.own.start * self.width, len(self.plan.own) * self.width)
        columns = x.narrow(dim, 0, self.height * self.width).unflatten(dim, self.size)
        mine = columns.narrow(dim + 1, self.plan.own.start, len(self.plan.own))
        return mine.transpose(dim, dim + 1).flatten(dim, dim + 1)

    def own_patches(self, x: Tensor, side: int) -> Tensor:
        """This rank's rows [..., R x side, W x side] of `x`, which has `side` x `side` entries for each token."""
        rows = slice(side * self.plan.own.start, side * self.plan.own.stop)
        return transposed_patches(x[..., rows], side) if self.by_columns else x[..., rows, :]


def stale_bytes(size: tuple[int, int], group: Group, settings: Settings, *, token_bytes: int, layers: int) -> int:
    """Bytes of the stale schedule's buffers on this rank, as in `halo_bytes_kept`, for an image of `size` tokens."""
    image = settings.stripe(size, group.size)
    plan, row_bytes = geometry.plan_halos(image.stripes, group.rank, settings.options.radius), image.width * token_bytes
    needed = needed_bytes(plan, row_bytes=row_bytes, layers=layers)
    if settings.pooling is not None:
        pooled = geometry.plan_pooled(image.stripes, group.rank, settings.unit)
        needed += needed_bytes(pooled, row_bytes=row_bytes // settings.unit, layers=layers)
    return needed


def largest_call(image: Striping, radius: int) -> dict[str, int]:
    """Bounds of any rank's attention calls, equal on all ranks so that all choose one backend."""
    rows = max(map(len, image.stripes))
    # Own rows and each halo have a call of their own, with no more rows of keys than this.
    key_rows = min(image.stripes[-1].stop, rows + 2 * (radius - 1))
    return {"rows": rows, "key_rows": key_rows, "columns": image.width, "radius": radius}


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

    Raises ValueError for more ranks than units, a side that is no multiple of the unit, or no backend.
    """
    # A wider circle than the image holds the same keys.
    radius = settings.options.radius and min(settings.options.radius, geometry.covering_radius(*size))
    image = settings.stripe(size, group.size)
    stripes, width, height = image.stripes, image.width, image.stripes[-1].stop
    plan = geometry.plan_halos(stripes, group.rank, radius)
    if image.by_columns and settings.pooling is not None:
        settings = replace(settings, pooling=settings.pooling.transposed())
    side = None if extrapolation is None else extrapolation.text_block
    copies = Copies.of(stripes, width, group.rank, side, settings.reduction, is_apart=radius is not None)
    shared: dict[str, Any] = {
        "plan": plan,
        "grid": Rows(0, height),
        "width": width,
        "blocks": copies.blocks,
        "extrapolation": extrapolation,
    }
    joint_attention: JointAttention = FullJointAttention(**shared)
    if radius is not None:
        square = settings.options.window_shape == "square"
        backend = settings.choose_backend(**largest_call(image, radius), text=text_tokens, square=square)
        joint_attention = WindowJointAttention(radius=radius, square=square, backend=backend, **shared)
    return Cut(
        height=height,
        width=width,
        by_columns=image.by_columns,
        made_for=(size, extrapolation, text_tokens, clock is not None),
        group=group,
        extrapolation=extrapolation,
        stale=clock is not None,
        stripes=stripes,
        plan=plan,
        copies=copies,
        joint_attention=joint_attention,
        exchanges=Exchanges(group, stripes, plan, settings, counters, clock),
        join=StripeJoin(group, stripes, counters),
    )


def others_first(x_BT: Tensor, text: TextPlan) -> Tensor:
    """`x_BT`, one entry per text token, in the order of `Heads`: other ranks' tokens, then mine."""
    own = text.own
    return torch.cat([x_BT[:, : own.start], x_BT[:, own.stop :], x_BT[:, own]], dim=1)


def choose_text_plan(asked: TextTokens, text_tokens: int, cut: Cut) -> TextPlan:
    """Text tokens that this rank takes through the blocks, of which there may be copies.

    `auto` decides from what is equal on all ranks; copies that are apart are held where they are needed.
    """
    group = cut.group
    if cut.copies.is_apart:
        return cut.copies.plan(text_tokens, group.rank)
    text_tokens *= len(cut.copies.blocks)
    # The stale schedule and transport through host memory are for slow links, where work is cheaper than messages.
    fast = group.transport != "host" and not cut.stale
    pays = fast and geometry.sharing_text_pays(text_tokens, cut.height * cut.width, group.size)
    if asked == "sharded" or (asked == "auto" and pays):
        return geometry.plan_text(text_tokens, group.size, group.rank)
    return geometry.plan_text(text_tokens, 1, 0)


def joined_tokens(mine_BLC: Tensor, cut: Cut) -> Tensor:
    """Tokens of the whole image [B, H x W, C] in raster order."""
    whole = cut.join.join(mine_BLC)
    return whole.unflatten(1, (cut.height, cut.width)).transpose(1, 2).flatten(1, 2) if cut.by_columns else whole


def joined_rows(mine_BCRW: Tensor, cut: Cut, packing: int) -> Tensor:
    """Latents of the whole image [B, C, H, W]; a row of tokens, `packing` of latents, travels in one piece."""
    rows = mine_BCRW.unflatten(2, (-1, packing)).transpose(1, 2)
    whole = cut.join.join(rows.flatten(2).contiguous())
    whole = whole.unflatten(2, rows.shape[2:]).transpose(1, 2).flatten(2, 3)
    return transposed_patches(whole, packing) if cut.by_columns else whole


def transposed_patches(x: Tensor, side: int) -> Tensor:
    """Patches of `side` x `side` in each other's places, as of the transposed image, their contents as they are."""
    patches = x.unflatten(-1, (-1, side)).unflatten(-3, (-1, side))
    return patches.transpose(-4, -2).flatten(-2).flatten(-3, -2)
