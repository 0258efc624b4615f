"""The oracle for the other backends, slow and plain: one dense mask, all scores at once, float32.

Shape suffixes: B batch, R rows of queries, E rows of keys, W columns, N heads, T text tokens, D head dim.
"""

import torch
from torch import Tensor

from clear_dist.attention.backend import Backend, WindowCall, squared_distance, why_too_many_scores


def run(call: WindowCall) -> tuple[Tensor, Tensor]:
    query = call.query.flatten(1, 2).float()
    key = torch.cat([call.key_text, call.key.flatten(1, 2)], dim=1).float()
    value = torch.cat([call.value_text, call.value.flatten(1, 2)], dim=1).float()
    score = torch.einsum("blnd,bsnd->blns", query, key) * call.scale
    score.masked_fill_(~visible_keys(call)[:, None], -torch.inf)
    out = torch.einsum("blns,bsnd->blnd", score.softmax(-1), value)
    return out.reshape(call.query.shape).to(call.query.dtype), score.logsumexp(-1).reshape(call.query.shape[:-1])


def visible_keys(call: WindowCall) -> Tensor:
    """Keys that each query sees, bool [R * W, T + E * W]: all text keys, and the image keys within the circle."""
    rows, columns = call.query.shape[1:3]
    key_rows, text = call.key.shape[1], call.key_text.shape[1]
    device = call.query.device
    row = torch.arange(rows, device=device).repeat_interleave(columns) + call.row_offset
    column = torch.arange(columns, device=device).repeat(rows)
    key_row = torch.arange(key_rows, device=device).repeat_interleave(columns)
    key_column = torch.arange(columns, device=device).repeat(key_rows)
    down, across = (row[:, None] - key_row).square(), (column[:, None] - key_column).square()
    squared = squared_distance(down, across, call.square)
    all_text = torch.ones(rows * columns, text, dtype=torch.bool, device=device)
    return torch.cat([all_text, squared < call.radius**2], dim=1)


BACKEND = Backend("reference", why_too_many_scores, run)
