"""Whether all ranks take all text tokens through the blocks, or each takes a share of them."""

from clear_dist.config import TextTokens
from clear_dist.geometry import TextPlan, plan_text
from clear_dist.models.cut import Cut

LEAST_PART = 0.1
"""Of a rank's tokens that text must be where it is replicated, for sharing it to pay for two collectives a layer."""


def choose_text_plan(asked: TextTokens, text_tokens: int, cut: Cut) -> TextPlan:
    """The text tokens that this rank takes through the blocks.

    `auto` decides from numbers that are equal on all ranks. FLUX's 512 text tokens are shared at 1024 px from 2 ranks
    on, at 2048 px from 4, at 4096 px from 15: chosen by counts of operations, and timed on CPUs only.
    """
    group, image_tokens = cut.group, cut.height * cut.width
    part = text_tokens / (text_tokens + image_tokens / group.size)
    # Through host memory messages take longer than what they spare; and in the stale schedule nobody waits for any.
    pays = part >= LEAST_PART and group.transport != "host" and not cut.stale
    ranks = group.size if asked == "sharded" or (asked == "auto" and pays) else 1
    return plan_text(text_tokens, ranks, group.rank if ranks > 1 else 0)
