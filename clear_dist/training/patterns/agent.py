"""Agent attention (Eq. 11 and 12): queries of a smaller picture gather the values that all image queries then see."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import avg_pool2d, scaled_dot_product_attention

from clear_dist.training.attention import Layout
from clear_dist.training.patterns.compressed import Compressed, as_picture, as_tokens


@dataclass(frozen=True, kw_only=True)
class Agent(Compressed):
    """Agents are means of `factor` x `factor` image queries, fewer at a border; they attend to the image alone.

    They are the keys of the image queries, beside those of the text, and what they have gathered is the values.
    """

    factor: int

    def compress(
        self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, parameters: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        agents = as_tokens(avg_pool2d(as_picture(query, layout), self.factor, ceil_mode=True), query.shape[1])
        return agents, scaled_dot_product_attention(agents, key, value)

    def compressed(self, layout: Layout) -> int:
        return -(-layout.height // self.factor) * -(-layout.width // self.factor)

    def operations(self, layout: Layout, text: int, heads: int, head_dim: int) -> int:
        gathering = 4 * heads * head_dim * self.compressed(layout) * layout.image
        return super().operations(layout, text, heads, head_dim) + gathering
