"""One attention layer on one rank: what is sent, what is computed meanwhile, what is waited for.

Shared by all models: an adaptor projects and rotates q, k and v, and gets the joint output back, text tokens first.
Where each rank has a share of the text, q, k and v have room for all of it, its own last; the output is its own.
Shape suffixes: B batch, N heads, T text, R my rows, W columns, D head dim, L = T + R x W tokens, P pooled keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from clear_dist.attention import Backend, attend, window_attention
from clear_dist.comm.counters import labelled
from clear_dist.comm.halo_exchange import PendingHalos
from clear_dist.engine.exchanges import Exchange
from clear_dist.engine.extrapolation import Extrapolation, attention_scale
from clear_dist.engine.pooled_keys import PooledKeys
from clear_dist.geometry import HaloPlan, Rows, reach
from clear_dist.merge import RowsPart, merge_rows


@dataclass(frozen=True, kw_only=True)
class WindowJointAttention:
    """CLEAR's attention over stripes: image queries see text and circle (Sec. 3.2), text queries see all (Eq. 7).

    With down-sampled keys image queries see those of the whole image as well, text queries don't.
    """

    plan: HaloPlan
    grid: Rows
    width: int
    radius: int
    backend: Backend
    counts_text_keys: bool
    """Whether this rank's part of the text queries' attention holds the text keys: in `exact`, on one rank only."""
    extrapolation: Extrapolation | None

    def __call__(
        self, exchange: Exchange, halos: PendingHalos, query_BLND: Tensor, key_BLND: Tensor, value_BLND: Tensor
    ) -> Tensor:
        text_tokens = query_BLND.shape[1] - len(self.plan.own) * self.width
        query_text, query = self._split(query_BLND, text_tokens)
        key_text, key = self._split(key_BLND, text_tokens)
        value_text, value = self._split(value_BLND, text_tokens)
        scale = attention_scale(
            self.extrapolation,
            head_dim=query_BLND.shape[-1],
            text_tokens=text_tokens,
            image_tokens=len(self.grid) * self.width,
            pooled=exchange.pooled is not None,
        )

        exchange.gather.wait()  # other ranks' text tokens, where each has a share
        first_key = 0 if self.counts_text_keys else text_tokens
        with labelled("compute: text queries"):
            part = attend(query_text, key_BLND[:, first_key:], value_BLND[:, first_key:], scale)
        text = exchange.text.start(*part)

        def window(rows: Rows, keys: tuple[Tensor, ...], first_key_row: int) -> RowsPart:
            result = window_attention(
                query[:, rows.relative_to(self.plan.own.start)],
                *keys,
                radius=self.radius,
                row_offset=rows.start - first_key_row,
                scale=scale,
                backend=self.backend,
            )
            return RowsPart(rows, *result)

        with labelled("compute: own keys"):
            parts = [window(self.plan.own, (key, value, key_text, value_text), self.plan.own.start)]
        no_text = key_text[:, :0]
        for held, halo in zip(self.plan.halos, halos.wait(), strict=True):
            if len(held):
                with labelled("compute: halo keys"):
                    reaching = reach(held, self.plan.own, self.radius)
                    parts.append(window(reaching, (halo[0], halo[1], no_text, no_text), held.start))
        halos.release()
        if exchange.pooled is not None:
            parts.append(self._to_pooled_keys(exchange.pooled, query, scale))
        elsewhere = exchange.gather.plan.elsewhere
        output_BLND = torch.empty_like(query_BLND[:, elsewhere:])
        output_text, output = self._split(output_BLND, text_tokens - elsewhere)
        with labelled("compute: merge"):
            merge_rows(parts, output, self.plan.own.start)
        output_text.copy_(text.wait())
        return output_BLND

    def _to_pooled_keys(self, pooled: PooledKeys, query_BRWND: Tensor, scale: float | None) -> RowsPart:
        keys_BPND, values_BPND = pooled.wait()
        with labelled("compute: pooled keys"):
            results = attend(query_BRWND.flatten(1, 2), keys_BPND, values_BPND, scale)
        return RowsPart(self.plan.own, *(result.unflatten(1, query_BRWND.shape[1:3]) for result in results))

    def _split(self, x_BLND: Tensor, text_tokens: int) -> tuple[Tensor, Tensor]:
        """Views of the text tokens [B, T, N, D] and of the image tokens [B, R, W, N, D]."""
        return x_BLND[:, :text_tokens], x_BLND[:, text_tokens:].unflatten(1, (len(self.plan.own), self.width))


@dataclass(frozen=True, kw_only=True)
class FullJointAttention:
    """Full attention over stripes: the whole grid is the halo, and every rank computes the text tokens alike."""

    plan: HaloPlan
    width: int
    counts_text_keys: bool
    """As above; for halos that lag only."""
    extrapolation: Extrapolation | None

    def __call__(
        self, exchange: Exchange, halos: PendingHalos, query_BLND: Tensor, key_BLND: Tensor, value_BLND: Tensor
    ) -> Tensor:
        text_tokens = query_BLND.shape[1] - len(self.plan.own) * self.width
        exchange.gather.wait()
        text = (key_BLND[:, :text_tokens], value_BLND[:, :text_tokens])
        own = (key_BLND[:, text_tokens:], value_BLND[:, text_tokens:])
        above, below = halos.wait()
        key, value = (
            torch.cat([text[i], above[i].flatten(1, 2), own[i], below[i].flatten(1, 2)], dim=1) for i in range(2)
        )
        halos.release()
        scale = attention_scale(
            self.extrapolation,
            head_dim=query_BLND.shape[-1],
            text_tokens=text_tokens,
            image_tokens=key.shape[1] - text_tokens,
        )
        with labelled("compute: full attention"):
            output = torch.nn.functional.scaled_dot_product_attention(
                query_BLND[:, exchange.gather.plan.elsewhere :].transpose(1, 2),
                key.transpose(1, 2),
                value.transpose(1, 2),
                scale=scale,
            )
        output_BLND = output.transpose(1, 2)
        if halos.lag:  # keys differ from rank to rank, text tokens must not
            first_key = 0 if self.counts_text_keys else text_tokens
            with labelled("compute: text queries"):
                mine = attend(query_BLND[:, :text_tokens], key_BLND[:, first_key:], value_BLND[:, first_key:], scale)
            output_BLND[:, :text_tokens] = exchange.text.start(*mine).wait()
        return output_BLND


JointAttention = WindowJointAttention | FullJointAttention
"""(exchange, halos, q, k, v) -> output; tensors are [B, L, N, D], with the text tokens first."""
