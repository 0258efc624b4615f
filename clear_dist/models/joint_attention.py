"""One attention layer on one rank: what is sent, what is computed meanwhile, what is waited for (design, section 3).

Shared by all models: an adaptor projects and rotates q, k and v, and gets the joint output back, text tokens first.
Shape suffixes: B batch, N heads, T text, R my rows, E my rows with halos, W columns, D head dim, L = T + R x W tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from clear_dist.attention import Backend, attend, window_attention
from clear_dist.comm.halo_exchange import PendingHalos
from clear_dist.geometry import HaloPlan, Rows, reach
from clear_dist.labels import labelled
from clear_dist.models.exchanges import Exchange
from clear_dist.models.extrapolation import Extrapolation, attention_scale


@dataclass(frozen=True, kw_only=True)
class WindowJointAttention:
    """CLEAR's attention over stripes: image queries see text and circle (Sec. 3.2), text queries see all (Eq. 7)."""

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
        )

        first_key = 0 if self.counts_text_keys else text_tokens
        with labelled("compute: text queries"):
            part = attend(query_text, key_BLND[:, first_key:], value_BLND[:, first_key:], scale)
        text = exchange.text.start(*part)

        output_BLND = torch.empty_like(query_BLND)
        output_text, output = self._split(output_BLND, text_tokens)

        def attend_rows(rows: Rows, extended: tuple[Tensor, Tensor], first_row: int) -> None:
            mine = rows.relative_to(self.plan.own.start)
            output[:, mine] = window_attention(
                query[:, mine],
                *extended,
                key_text,
                value_text,
                radius=self.radius,
                row_offset=rows.start - first_row,
                scale=scale,
                backend=self.backend,
            )

        if len(self.plan.inner):
            with labelled("compute: inner rows"):
                attend_rows(self.plan.inner, (key, value), self.plan.own.start)
        above, below = halos.wait()
        for rows in self.plan.edges:
            keys = reach(rows, self.grid, self.radius)
            with labelled("compute: edge rows"):
                attend_rows(rows, extend(keys, self.plan.own, above, (key, value), below), keys.start)
        halos.release()
        output_text.copy_(text.wait())
        return output_BLND

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
                query_BLND.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scale=scale
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


def extend(rows: Rows, own: Rows, above: Tensor, mine: tuple[Tensor, Tensor], below: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of `rows` [B, E, W, N, D] from the stripe `own` and the halos [2, B, rows, W, N, D] beside it."""
    sources = ((own.start - above.shape[2], above), (own.start, mine), (own.stop, below))

    def joined(index: int) -> Tensor:
        parts = []
        for first_row, held in sources:
            wanted = Rows(first_row, first_row + held[index].shape[1]).intersect(rows)
            parts.append(held[index][:, wanted.relative_to(first_row)])
        return torch.cat(parts, dim=1)

    return joined(0), joined(1)
