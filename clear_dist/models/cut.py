"""How one image is cut over a group: its stripes, and what they exchange in every layer and once per step."""

from dataclasses import dataclass

from clear_dist.attention import Backend
from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.comm.halo_exchange import HaloExchange
from clear_dist.comm.stripe_join import StripeJoin
from clear_dist.comm.text_reduce import TextAttention, TextReduce
from clear_dist.geometry import HaloPlan, Rows, covering_radius, cut_in_stripes, plan_halos
from clear_dist.models.extrapolation import Extrapolation
from clear_dist.models.joint_attention import FullJointAttention, JointAttention, WindowJointAttention


@dataclass(frozen=True, kw_only=True)
class Cut:
    """An image of `height` x `width` tokens on a group's stripes; its buffers serve one such image after another."""

    height: int
    width: int
    group: Group
    extrapolation: Extrapolation | None
    stripes: tuple[Rows, ...]
    plan: HaloPlan
    joint_attention: JointAttention
    join: StripeJoin

    @property
    def tokens(self) -> slice:
        """This rank's tokens in raster order."""
        return slice(self.plan.own.start * self.width, self.plan.own.stop * self.width)

    def serves(self, size: tuple[int, int], group: Group, extrapolation: Extrapolation | None) -> bool:
        """Whether it is what `cut_image` would make for these."""
        return (self.height, self.width) == size and self.group is group and self.extrapolation == extrapolation


def cut_image(
    size: tuple[int, int],
    group: Group,
    extrapolation: Extrapolation | None,
    *,
    radius: int | None,
    text_attention: TextAttention,
    backend: Backend,
    counters: Counters,
) -> Cut:
    """Cuts an image for this rank; nothing is sent.

    Args:
        size: height and width in tokens.
        radius: in tokens; None: full attention.

    Raises:
        ValueError: there are more ranks than rows.
    """
    height, width = size
    stripes = cut_in_stripes(height, group.size)
    # A wider circle than the image holds the same keys.
    radius = radius and min(radius, covering_radius(height, width))
    plan = plan_halos(stripes, group.rank, radius)
    halos = HaloExchange(group, plan, counters)
    joint_attention: JointAttention
    if radius is None:
        joint_attention = FullJointAttention(plan=plan, width=width, halos=halos, extrapolation=extrapolation)
    else:
        joint_attention = WindowJointAttention(
            plan=plan,
            grid=Rows(0, height),
            width=width,
            radius=radius,
            halos=halos,
            text_reduce=TextReduce(group, text_attention, counters),
            backend=backend,
            counts_text_keys=text_attention == "average" or group.rank == 0,
            extrapolation=extrapolation,
        )
    return Cut(
        height=height,
        width=width,
        group=group,
        extrapolation=extrapolation,
        stripes=stripes,
        plan=plan,
        joint_attention=joint_attention,
        join=StripeJoin(group, stripes, counters),
    )
