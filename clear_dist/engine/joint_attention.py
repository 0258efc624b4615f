"""One attention layer on one rank: messages, and what is computed meanwhile.

A family projects q, k and v (`heads.py`) and gets the output back, text tokens first. Where each rank has a share of
the text, q, k and v have room for all of it, its own last; the output is its own.

Shapes: B batch, N heads, T text, R my rows, W columns, D head dim, L = T + R x W tokens, P pooled keys, S all keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from clear_dist.attention import Backend, attend, attend_masked, extend_attention, window_attention
from clear_dist.comm.counters import labelled
from clear_dist.comm.halo_exchange import PendingHalos
from clear_dist.engine.exchanges import Exchange
from clear_dist.engine.extrapolation import Extrapolation, attention_scale
from clear_dist.engine.text_copies import Block
from clear_dist.geometry import HaloPlan, Rows, reach
from clear_dist.merge import RowsPart, merge, merge_rows

Projected = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values [B, L, N, D], text tokens first."""


@dataclass(frozen=True, kw_only=True)
class Stripe:
    """One rank's stripe of an image, and what both kinds of attention on it have in common."""

    plan: HaloPlan
    grid: Rows
    width: int
    blocks: tuple[Block, ...]
    """Blocks whose copies of the text this rank holds; a single one has the text itself."""
    extrapolation: Extrapolation | None

    def _scale(self, query_BLND: Tensor, text_tokens: int, **further: Any) -> float | None:
        sizes: dict[str, Any] = {"head_dim": query_BLND.shape[-1], "image_tokens": len(self.grid) * self.width}
        return attention_scale(self.extrapolation, text_tokens=text_tokens, **sizes, **further)

    @labelled("compute: text queries")
    def _text_part(
        self, qkv: Projected, text_tokens: int, scale: float | None, text_mask_BT: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Text queries' attention (out, lse) to my rows and, if it counts here, to the text."""
        query_BTND, (key, value) = qkv[0][:, :text_tokens], qkv[1:]
        seen = text_tokens if self.blocks[0].counts_text_keys else 0
        if text_mask_BT is None or not seen:
            return attend(query_BTND, key[:, text_tokens - seen :], value[:, text_tokens - seen :], scale)
        to_text = attend_masked(query_BTND, key[:, :text_tokens], value[:, :text_tokens], scale, text_mask_BT)
        return merge([attend(query_BTND, key[:, text_tokens:], value[:, text_tokens:], scale), to_text])


@dataclass(frozen=True, kw_only=True)
class WindowJointAttention(Stripe):
    """Image queries see text, circle (Sec. 3.2) and any down-sampled keys, text queries all but the latter (Eq. 7)."""

    radius: int
    square: bool
    backend: Backend

    def __call__(
        self,
        exchange: Exchange,
        halos: PendingHalos,
        qkv: Projected,
        text_mask_BT: Tensor | None,
        out_BLND: Tensor | None = None,
    ) -> Tensor:
        query_BLND, *keys_BLND = qkv
        text_tokens = query_BLND.shape[1] - len(self.plan.own) * self.width
        query = self._split(query_BLND, text_tokens)[1]
        copies = len(self.blocks)
        scale = self._scale(query_BLND, text_tokens // copies, pooled=exchange.pooled is not None)

        exchange.gather.wait()  # other ranks' text tokens, where each has a share
        attended = self._text_part if copies == 1 else self._copies_part
        text = exchange.text.start(*attended(qkv, text_tokens, scale, text_mask_BT))
        elsewhere = exchange.gather.plan.elsewhere
        output_BLND = torch.empty_like(query_BLND[:, elsewhere:]) if out_BLND is None else out_BLND
        output_text, output = self._split(output_BLND, text_tokens - elsewhere)
        parts = self._image_parts(halos, query, keys_BLND, output, scale, text_mask_BT)
        if exchange.pooled is not None:
            pooled_BPND = exchange.pooled.wait()
            with labelled("compute: pooled keys"):
                parts.append(self._part_of_own(query, attend(query.flatten(1, 2), *pooled_BPND, scale)))
        with labelled("compute: merge"):
            merge_rows(parts, output, self.plan.own.start)
        text.wait(output_text)
        return output_BLND

    def alone(self, halos: PendingHalos, qkv: Projected, out_BLND: Tensor | None = None) -> Tensor:
        """Where a layer sees the image alone: neither text nor down-sampled keys."""
        query_BLND, *keys_BLND = qkv
        query, scale = self._split(query_BLND, 0)[1], self._scale(query_BLND, 0)
        output_BLND = torch.empty_like(query_BLND) if out_BLND is None else out_BLND
        output = self._split(output_BLND, 0)[1]
        parts = self._image_parts(halos, query, keys_BLND, output, scale, None)
        with labelled("compute: merge"):
            merge_rows(parts, output, self.plan.own.start)
        return output_BLND

    def _image_parts(
        self,
        halos: PendingHalos,
        query_BRWND: Tensor,
        keys_BLND: Sequence[Tensor],
        output_BRWND: Tensor,
        scale: float | None,
        text_mask_BT: Tensor | None,
    ) -> list[RowsPart]:
        """Attention to text and circle; that to my own keys is in `output_BRWND` already where the backend can."""
        text_tokens = keys_BLND[0].shape[1] - len(self.plan.own) * self.width
        (key_text, key), (value_text, value) = (self._split(x, text_tokens) for x in keys_BLND)
        no_text = key_text[:, :0]
        how: dict[str, Any] = {"radius": self.radius, "scale": scale, "backend": self.backend}
        parts = []
        if text_mask_BT is not None:  # windows have no place for a mask: the text is a part of its own
            seen = attend_masked(query_BRWND.flatten(1, 2), key_text, value_text, scale, text_mask_BT)
            parts.append(self._part_of_own(query_BRWND, seen))
            key_text = value_text = no_text
        elif text_tokens and len(self.blocks) > 1:  # nor has it for copies of which each query sees one
            parts.append(self._part_of_copies(query_BRWND, (key_text, value_text), scale))
            key_text = value_text = no_text
        with labelled("compute: own keys"):
            keys = key, value, key_text, value_text
            out, lse = window_attention(
                query_BRWND, *keys, row_offset=0, square=self.square, out_BRWND=output_BRWND, **how
            )
        parts.append(RowsPart(self.plan.own, out, lse))
        for held, halo in zip(self.plan.halos, halos.wait(), strict=True):
            if len(held):
                reaching = reach(held, self.plan.own, self.radius)
                mine, how["row_offset"] = reaching.relative_to(self.plan.own.start), reaching.start - held.start
                to_halo = query_BRWND[:, mine], halo[0], halo[1]
                with labelled("compute: halo keys"):
                    if self.backend.extend is not None:
                        extend_attention(
                            *to_halo, no_text, no_text, out_BRWND=out[:, mine], lse_BRWN=lse[:, mine], **how
                        )
                    else:
                        results = window_attention(*to_halo, no_text, no_text, square=self.square, **how)
                        parts.append(RowsPart(reaching, *results))
        halos.release()
        return parts

    @labelled("compute: text queries")
    def _copies_part(
        self, qkv: Projected, text_tokens: int, scale: float | None, text_mask_BT: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Attention (out, lse) of each copy's queries to my rows of its block and, if it counts here, to the copy."""
        assert text_mask_BT is None, "no family with padded text has copies of it"
        texts, images = zip(*(self._split(x, text_tokens) for x in qkv), strict=True)
        parts = []
        for block, query, key, value in zip(self.blocks, *self._chunks(texts), strict=True):
            key_image, value_image = (x[self._of(block)].flatten(1, 2) for x in images[1:])
            part = attend(query, key_image, value_image, scale)
            parts.append(merge([part, attend(query, key, value, scale)]) if block.counts_text_keys else part)
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs, dim=1), torch.cat(lses, dim=1)

    def _part_of_copies(self, query_BRWND: Tensor, texts_BTND: Sequence[Tensor], scale: float | None) -> RowsPart:
        """Attention of my rows to the copy of the block that each token lies in."""
        out_BRWND = torch.empty_like(query_BRWND)
        lse_BRWN = query_BRWND.new_empty(query_BRWND.shape[:-1], dtype=torch.float32)
        for block, key, value in zip(self.blocks, *self._chunks(texts_BTND), strict=True):
            mine = query_BRWND[self._of(block)]
            results = attend(mine.flatten(1, 2), key, value, scale)
            for whole, result in zip((out_BRWND, lse_BRWN), results, strict=True):
                whole[self._of(block)] = result.unflatten(1, mine.shape[1:3])
        return RowsPart(self.plan.own, out_BRWND, lse_BRWN)

    def _chunks(self, texts_BTND: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """Each tensor's part of every copy."""
        return [x.chunk(len(self.blocks), dim=1) for x in texts_BTND]

    def _of(self, block: Block) -> tuple[slice, slice, slice]:
        """Where a block's tokens are in my rows [B, R, W, ...]."""
        rows = block.rows.intersect(self.plan.own).relative_to(self.plan.own.start)
        return slice(None), rows, slice(block.columns.start, block.columns.stop)

    def _part_of_own(self, query_BRWND: Tensor, results: tuple[Tensor, Tensor]) -> RowsPart:
        return RowsPart(self.plan.own, *(result.unflatten(1, query_BRWND.shape[1:3]) for result in results))

    def _split(self, x_BLND: Tensor, text_tokens: int) -> tuple[Tensor, Tensor]:
        """Views of the text tokens [B, T, N, D] and of the image tokens [B, R, W, N, D]."""
        return x_BLND[:, :text_tokens], x_BLND[:, text_tokens:].unflatten(1, (len(self.plan.own), self.width))


class FullJointAttention(Stripe):
    """Full attention over stripes: the whole grid is the halo, and every rank computes all text tokens."""

    def __call__(
        self,
        exchange: Exchange,
        halos: PendingHalos,
        qkv: Projected,
        text_mask_BT: Tensor | None,
        out_BLND: Tensor | None = None,
    ) -> Tensor:
        query_BLND, key_BLND, value_BLND = qkv
        text_tokens = query_BLND.shape[1] - len(self.plan.own) * self.width
        exchange.gather.wait()
        own = query_BLND[:, exchange.gather.plan.elsewhere :], key_BLND, value_BLND
        output_BLND = self._to_all(halos, own, text_tokens, text_mask_BT)
        if halos.lag:  # keys differ from rank to rank, text tokens must not
            part = self._text_part(qkv, text_tokens, self._scale(query_BLND, text_tokens), text_mask_BT)
            exchange.text.start(*part).wait(output_BLND[:, :text_tokens])
        return output_BLND if out_BLND is None else out_BLND.copy_(output_BLND)

    def alone(self, halos: PendingHalos, qkv: Projected, out_BLND: Tensor | None = None) -> Tensor:
        output_BLND = self._to_all(halos, qkv, 0, None)
        return output_BLND if out_BLND is None else out_BLND.copy_(output_BLND)

    def _to_all(self, halos: PendingHalos, qkv: Projected, text_tokens: int, text_mask_BT: Tensor | None) -> Tensor:
        query_BLND, *keys_BLND = qkv
        above, below = halos.wait()
        key_BSND, value_BSND = (self._whole(x, text_tokens, above[i], below[i]) for i, x in enumerate(keys_BLND))
        halos.release()
        mask_B11S, image_tokens = None, key_BSND.shape[1] - text_tokens
        if text_mask_BT is not None:
            mask_B11S = pad(text_mask_BT, (0, image_tokens), value=True)[:, None, None]
        query, key, value = (x.transpose(1, 2) for x in (query_BLND, key_BSND, value_BSND))
        scale = self._scale(query_BLND, text_tokens, copies=len(self.blocks))
        with labelled("compute: full attention"):
            return scaled_dot_product_attention(query, key, value, attn_mask=mask_B11S, scale=scale).transpose(1, 2)

    def _whole(self, mine_BLND: Tensor, text_tokens: int, above_BRWND: Tensor, below_BRWND: Tensor) -> Tensor:
        """Text, then the tokens of the whole grid, [B, S, N, D]."""
        batch, _, *heads = mine_BLND.shape
        whole_BSND = mine_BLND.new_empty(batch, text_tokens + len(self.grid) * self.width, *heads)
        whole_BSND[:, :text_tokens] = mine_BLND[:, :text_tokens]
        own_BRWND = mine_BLND[:, text_tokens:].unflatten(1, (-1, self.width))
        rows = [x.flatten(2) for x in (above_BRWND, own_BRWND, below_BRWND)]
        torch.cat(rows, dim=1, out=whole_BSND[:, text_tokens:].view(batch, len(self.grid), -1))
        return whole_BSND


JointAttention = WindowJointAttention | FullJointAttention
"""(exchange, halos, q, k and v, mask of padded text, where to write) -> output [B, L, N, D], text tokens first."""
