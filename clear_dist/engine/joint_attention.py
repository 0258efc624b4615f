"""One attention layer on one rank: messages, and what is computed meanwhile.

A family projects q, k and v (`heads.py`) and gets the output back, text tokens first. Where each rank has a share of
the text, q, k and v have room for all of it, its own last; the output is its own.

Shapes: B batch, N heads, T text, R my rows, W columns, D head dim, L = T + R x W tokens, P pooled keys, S all keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from clear_dist.attention import Backend, attend, attend_masked, window_attention
from clear_dist.comm.counters import labelled
from clear_dist.comm.halo_exchange import PendingHalos
from clear_dist.engine.exchanges import Exchange
from clear_dist.engine.extrapolation import Extrapolation, attention_scale
from clear_dist.engine.pooled_keys import PooledKeys
from clear_dist.geometry import HaloPlan, Rows, reach
from clear_dist.merge import RowsPart, merge, merge_rows


@dataclass(frozen=True, kw_only=True)
class WindowJointAttention:
    """Image queries see text, circle (Sec. 3.2) and any down-sampled keys, text queries all but the latter (Eq. 7)."""

    plan: HaloPlan
    grid: Rows
    width: int
    radius: int
    backend: Backend
    counts_text_keys: bool
    """Whether this rank's part of the text queries' attention holds the text keys (`exact`: on one rank only)."""
    extrapolation: Extrapolation | None

    def __call__(
        self,
        exchange: Exchange,
        halos: PendingHalos,
        query_BLND: Tensor,
        key_BLND: Tensor,
        value_BLND: Tensor,
        text_mask_BT: Tensor | None = None,
    ) -> Tensor:
        text_tokens = query_BLND.shape[1] - len(self.plan.own) * self.width
        query_text, query = self._split(query_BLND, text_tokens)
        scale = self._scale(query_BLND, text_tokens, pooled=exchange.pooled is not None)

        exchange.gather.wait()  # other ranks' text tokens, where each has a share
        with labelled("compute: text queries"):
            seen = text_tokens if self.counts_text_keys else 0
            part = text_part(query_text, key_BLND, value_BLND, scale, (text_tokens, seen), text_mask_BT)
        text = exchange.text.start(*part)
        parts = self._image_parts(halos, query, (key_BLND, value_BLND), text_tokens, scale, text_mask_BT)
        if exchange.pooled is not None:
            parts.append(self._to_pooled_keys(exchange.pooled, query, scale))
        elsewhere = exchange.gather.plan.elsewhere
        output_BLND = torch.empty_like(query_BLND[:, elsewhere:])
        output_text, output = self._split(output_BLND, text_tokens - elsewhere)
        with labelled("compute: merge"):
            merge_rows(parts, output, self.plan.own.start)
        output_text.copy_(text.wait())
        return output_BLND

    def alone(self, halos: PendingHalos, query_BLND: Tensor, key_BLND: Tensor, value_BLND: Tensor) -> Tensor:
        """Where a layer sees the image alone: neither text nor down-sampled keys."""
        query, scale = self._split(query_BLND, 0)[1], self._scale(query_BLND, 0)
        parts = self._image_parts(halos, query, (key_BLND, value_BLND), 0, scale, None)
        output_BLND = torch.empty_like(query_BLND)
        with labelled("compute: merge"):
            merge_rows(parts, self._split(output_BLND, 0)[1], self.plan.own.start)
        return output_BLND

    def _image_parts(
        self,
        halos: PendingHalos,
        query_BRWND: Tensor,
        keys_BLND: tuple[Tensor, Tensor],
        text_tokens: int,
        scale: float | None,
        text_mask_BT: Tensor | None,
    ) -> list[RowsPart]:
        (key_text, key), (value_text, value) = (self._split(x, text_tokens) for x in keys_BLND)
        no_text = key_text[:, :0]

        def window(rows: Rows, keys: tuple[Tensor, ...], first_key_row: int) -> RowsPart:
            result = window_attention(
                query_BRWND[:, rows.relative_to(self.plan.own.start)],
                *keys,
                radius=self.radius,
                row_offset=rows.start - first_key_row,
                scale=scale,
                backend=self.backend,
            )
            return RowsPart(rows, *result)

        parts = []
        if text_mask_BT is not None:  # windows have no place for a mask: the text is a part of its own
            seen = attend_masked(query_BRWND.flatten(1, 2), key_text, value_text, scale, text_mask_BT)
            parts.append(self._part_of_own(query_BRWND, seen))
            key_text = value_text = no_text
        with labelled("compute: own keys"):
            parts.append(window(self.plan.own, (key, value, key_text, value_text), self.plan.own.start))
        for held, halo in zip(self.plan.halos, halos.wait(), strict=True):
            if len(held):
                with labelled("compute: halo keys"):
                    reaching = reach(held, self.plan.own, self.radius)
                    parts.append(window(reaching, (halo[0], halo[1], no_text, no_text), held.start))
        halos.release()
        return parts

    def _to_pooled_keys(self, pooled: PooledKeys, query_BRWND: Tensor, scale: float | None) -> RowsPart:
        keys_BPND, values_BPND = pooled.wait()
        with labelled("compute: pooled keys"):
            return self._part_of_own(query_BRWND, attend(query_BRWND.flatten(1, 2), keys_BPND, values_BPND, scale))

    def _part_of_own(self, query_BRWND: Tensor, results: tuple[Tensor, Tensor]) -> RowsPart:
        return RowsPart(self.plan.own, *(result.unflatten(1, query_BRWND.shape[1:3]) for result in results))

    def _scale(self, query_BLND: Tensor, text_tokens: int, *, pooled: bool = False) -> float | None:
        return attention_scale(
            self.extrapolation,
            head_dim=query_BLND.shape[-1],
            text_tokens=text_tokens,
            image_tokens=len(self.grid) * self.width,
            pooled=pooled,
        )

    def _split(self, x_BLND: Tensor, text_tokens: int) -> tuple[Tensor, Tensor]:
        """Views of the text tokens [B, T, N, D] and of the image tokens [B, R, W, N, D]."""
        return x_BLND[:, :text_tokens], x_BLND[:, text_tokens:].unflatten(1, (len(self.plan.own), self.width))


@dataclass(frozen=True, kw_only=True)
class FullJointAttention:
    """Full attention over stripes: the whole grid is the halo, and every rank computes all text tokens."""

    plan: HaloPlan
    width: int
    counts_text_keys: bool
    """As in `WindowJointAttention`; used only where halos lag."""
    extrapolation: Extrapolation | None

    def __call__(
        self,
        exchange: Exchange,
        halos: PendingHalos,
        query_BLND: Tensor,
        key_BLND: Tensor,
        value_BLND: Tensor,
        text_mask_BT: Tensor | None = None,
    ) -> Tensor:
        text_tokens = query_BLND.shape[1] - len(self.plan.own) * self.width
        exchange.gather.wait()
        query = query_BLND[:, exchange.gather.plan.elsewhere :]
        output_BLND, scale = self._to_all(halos, query, (key_BLND, value_BLND), text_tokens, text_mask_BT)
        if halos.lag:  # keys differ from rank to rank, text tokens must not
            with labelled("compute: text queries"):
                seen = text_tokens if self.counts_text_keys else 0
                query_text = query_BLND[:, :text_tokens]
                mine = text_part(query_text, key_BLND, value_BLND, scale, (text_tokens, seen), text_mask_BT)
            output_BLND[:, :text_tokens] = exchange.text.start(*mine).wait()
        return output_BLND

    def alone(self, halos: PendingHalos, query_BLND: Tensor, key_BLND: Tensor, value_BLND: Tensor) -> Tensor:
        return self._to_all(halos, query_BLND, (key_BLND, value_BLND), 0, None)[0]

    def _to_all(
        self,
        halos: PendingHalos,
        query_BLND: Tensor,
        keys_BLND: tuple[Tensor, Tensor],
        text_tokens: int,
        text_mask_BT: Tensor | None,
    ) -> tuple[Tensor, float | None]:
        above, below = halos.wait()
        key_BSND, value_BSND = (
            torch.cat([x[:, :text_tokens], above[i].flatten(1, 2), x[:, text_tokens:], below[i].flatten(1, 2)], dim=1)
            for i, x in enumerate(keys_BLND)
        )
        halos.release()
        image_tokens = key_BSND.shape[1] - text_tokens
        scale = attention_scale(
            self.extrapolation, head_dim=query_BLND.shape[-1], text_tokens=text_tokens, image_tokens=image_tokens
        )
        mask_B11S = None if text_mask_BT is None else pad(text_mask_BT, (0, image_tokens), value=True)[:, None, None]
        with labelled("compute: full attention"):
            output_BNLD = scaled_dot_product_attention(
                query_BLND.transpose(1, 2),
                key_BSND.transpose(1, 2),
                value_BSND.transpose(1, 2),
                attn_mask=mask_B11S,
                scale=scale,
            )
        return output_BNLD.transpose(1, 2), scale


JointAttention = WindowJointAttention | FullJointAttention
"""(exchange, halos, q, k, v, mask of padded text) -> output; tensors are [B, L, N, D], text tokens first."""


def text_part(
    query_BTND: Tensor,
    key_BLND: Tensor,
    value_BLND: Tensor,
    scale: float | None,
    text_tokens: tuple[int, int],
    text_mask_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Text queries' attention (out, lse) to my rows and the text; `text_tokens`: all, and those that count here."""
    count, seen = text_tokens
    if text_mask_BT is None or not seen:
        return attend(query_BTND, key_BLND[:, count - seen :], value_BLND[:, count - seen :], scale)
    to_text = attend_masked(query_BTND, key_BLND[:, :count], value_BLND[:, :count], scale, text_mask_BT)
    return merge([attend(query_BTND, key_BLND[:, count:], value_BLND[:, count:], scale), to_text])
