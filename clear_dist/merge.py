"""Attention over parts of the keys, merged by log-sum-exp into attention over all of them.

O = sum_p O_p e^(lse_p - m) / sum_p e^(lse_p - m), where m is the largest lse_p: exact, however the keys were cut.
Sums are in float32 and rounded once. The torch form here is the reference of the kernels that do it on a GPU.

Shape suffixes: B batch, L queries (or R rows and W columns of them), N heads, D head dim; P parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, starmap

import torch
from torch import Tensor

from clear_dist.geometry import Rows
from clear_dist.kernels import merging, usable


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint sets of keys: (out [B, L, N, D], lse [B, L, N] in float32) each.

    An lse of -inf means no key, whatever the output; dtype as of the first part. Raises ValueError where there is none.
    """
    if not parts:
        raise ValueError("merge needs at least one part, got none")
    if _by_kernel(parts[0][0]):
        merged_BLND, merged_BLN = (x.new_empty(x.shape) for x in parts[0])
        merging.merge([(out, lse, 0) for out, lse in parts], merged_BLND, merged_BLN)
        return merged_BLND, merged_BLN
    lse_BLN = torch.stack([lse for _, lse in parts]).logsumexp(0)
    weighted = (_weigh(out, lse, lse_BLN)[0] for out, lse in parts)
    summed_BLND = next(weighted)
    for part_BLND in weighted:
        summed_BLND += part_BLND
    return summed_BLND.to(parts[0][0].dtype), lse_BLN


@dataclass(frozen=True)
class RowsPart:
    """Attention of some rows of queries to one set of keys: out [B, R, W, N, D], lse [B, R, W, N] in float32."""

    rows: Rows
    out: Tensor
    lse: Tensor

    def of(self, rows: Rows) -> tuple[Tensor, Tensor]:
        mine = rows.relative_to(self.rows.start)
        return self.out[:, mine], self.lse[:, mine]


def merge_rows(parts: Sequence[RowsPart], merged_BRWND: Tensor, first_row: int) -> None:
    """Merge parts, each of some rows, into `merged_BRWND`, which begins at `first_row` and may be a part's output.

    Rows of one part only are taken as they are.
    """
    if len(parts) == 1 and parts[0].out is merged_BRWND:
        return
    if _by_kernel(merged_BRWND):
        return merging.merge([(part.out, part.lse, part.rows.start - first_row) for part in parts], merged_BRWND)
    ends = sorted({end for part in parts for end in (part.rows.start, part.rows.stop)})
    for rows in starmap(Rows, pairwise(ends)):
        here = [part for part in parts if len(part.rows.intersect(rows))]
        if len(here) == 1 and here[0].out is merged_BRWND:
            continue
        of_rows = [part.of(rows) for part in here]
        merged_BRWND[:, rows.relative_to(first_row)] = merge(of_rows)[0] if len(here) > 1 else of_rows[0][0]


def merge_stacked(outs_PBLND: Tensor, lses_PBLN: Tensor | None, merged_BLND: Tensor) -> None:
    """Merge parts that lie in one tensor into `merged_BLND`; without log-sum-exps, their mean."""
    if _by_kernel(merged_BLND):
        merging.merge_stacked(outs_PBLND, lses_PBLN, merged_BLND)
    elif lses_PBLN is None:
        merged_BLND.copy_(outs_PBLND.mean(0, dtype=torch.float32))
    else:
        merged_BLND.copy_(_unweigh(_weighed(outs_PBLND, lses_PBLN, lses_PBLN.amax(0)).sum(0)))


def weigh(out_BLND: Tensor, lse_BLN: Tensor, maximum_BLN: Tensor, weighed_BLND1: Tensor) -> None:
    """Write the terms of one part, to be summed over parts or ranks, to float32 [B, L, N, D + 1].

    O_p e^(lse_p - m), then e^(lse_p - m), where m = `maximum_BLN` is the largest lse; 0 where the part has no key.
    """
    if _by_kernel(out_BLND):
        merging.weigh(out_BLND, lse_BLN, maximum_BLN, weighed_BLND1)
    else:
        weighed_BLND1.copy_(_weighed(out_BLND, lse_BLN, maximum_BLN))


def unweigh(summed_BLND1: Tensor, out_BLND: Tensor) -> None:
    """Write attention's output, from the sum of what `weigh` wrote of all parts; 0 where there is no key."""
    if _by_kernel(out_BLND):
        merging.unweigh(summed_BLND1, out_BLND)
    else:
        out_BLND.copy_(_unweigh(summed_BLND1))


def relay(
    summed_BLND1: Tensor, reference_BLN: Tensor, out_BLND: Tensor, lse_BLN: Tensor, before_BLND: Tensor, most: float
) -> None:
    """Unweigh a sum to `before_BLND`, and weigh the next part in its place.

    The log-sum-exp of what was summed, which replaces `reference_BLN`, is the reference in place of a maximum; a part's
    may differ from it by `most` and is cut off there.
    """
    if _by_kernel(out_BLND):
        return merging.relay(summed_BLND1, reference_BLN, out_BLND, lse_BLN, before_BLND, most)
    unweigh(summed_BLND1, before_BLND)
    reference_BLN += summed_BLND1[..., -1].log()
    weigh(out_BLND, lse_BLN.clamp(reference_BLN - most, reference_BLN + most), reference_BLN, summed_BLND1)


def pack_part(out_BLND: Tensor, lse_BLN: Tensor | None, packed_BLND: Tensor, *, first: int, to: int) -> None:
    """Copy attention, with the tokens from `first` on moved to `to`, before others, and behind it any `lse_BLN`.

    `packed_BLND` has room for the bits of the log-sum-exp: D + 2 numbers, in float32 D + 1.
    """
    head_dim = out_BLND.shape[-1]
    packed_out, packed_lse = packed_BLND[..., :head_dim], None if lse_BLN is None else unpack_lse(packed_BLND, head_dim)
    if _by_kernel(out_BLND):
        return merging.pack(out_BLND, lse_BLN, packed_out, packed_lse, first=first, to=to)
    for x, packed in ((out_BLND, packed_out), (lse_BLN, packed_lse)):
        if x is not None and packed is not None:
            packed.copy_(torch.cat([x[:, :to], x[:, first:], x[:, to:first]], dim=1))


def unpack_lse(packed: Tensor, head_dim: int) -> Tensor:
    """View of the log-sum-exp that `pack_part` wrote behind `head_dim` numbers of attention."""
    return packed.view(torch.float32)[..., head_dim * packed.itemsize // 4]


def _by_kernel(x: Tensor) -> bool:
    return x.is_meta or usable(x.device.type)  # the meta device counts what a GPU takes


def _unweigh(summed_BLND1: Tensor) -> Tensor:
    weight_BLN1 = summed_BLND1[..., -1:]
    return summed_BLND1[..., :-1] / weight_BLN1.masked_fill(weight_BLN1 == 0, 1.0)


def _weighed(out_BLND: Tensor, lse_BLN: Tensor, maximum_BLN: Tensor) -> Tensor:
    return torch.cat(_weigh(out_BLND, lse_BLN, maximum_BLN), dim=-1)


def _weigh(out_BLND: Tensor, lse_BLN: Tensor, reference_BLN: Tensor) -> tuple[Tensor, Tensor]:
    """(O_p w, w [B, L, N, 1]) in float32 with w = e^(lse_p - reference); both 0 where the part has no key."""
    without_key_BLN1 = lse_BLN.isneginf().unsqueeze(-1)
    weight_BLN1 = (lse_BLN - reference_BLN).exp_().unsqueeze(-1).masked_fill_(without_key_BLN1, 0.0)
    return (out_BLND.float() * weight_BLN1).masked_fill_(without_key_BLN1, 0.0), weight_BLN1
