"""Whether all ranks take all text tokens through the blocks, or each takes a share of them."""

from clear_dist.config import TextTokens
from clear_dist.geometry import TextPlan, plan_text, sharing_text_pays
from clear_dist.models.cut import Cut


def choose_text_plan(asked: TextTokens, text_tokens: int, cut: Cut) -> TextPlan:
    """The text tokens that this rank takes through the blocks; `auto` decides from what is equal on all ranks."""
    group = cut.group
    # The stale schedule and transport through host memory are for slow links, where work is cheaper than messages.
    fast = group.transport != "host" and not cut.stale
    pays = fast and sharing_text_pays(text_tokens, cut.height * cut.width, group.size)
    if asked == "sharded" or (asked == "auto" and pays):
        return plan_text(text_tokens, group.size, group.rank)
    return plan_text(text_tokens, 1, 0)
