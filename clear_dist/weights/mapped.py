"""Weights from memory-mapped safetensors: one copy in host memory, however many ranks there are.

On a CPU parameters are views of the files, whose pages all ranks of a machine share until one writes to them; only a
cast takes memory in each rank. Tensors go to a GPU one by one, as they are stored, and are cast there.
"""

import mmap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from clear_dist.cards.single_file import Layout, Piece


def load_mapped(
    model: nn.Module,
    files: Iterable[Path],
    *,
    dtype: torch.dtype,
    device: torch.device,
    advance: Callable[[int], None],
    layout: Layout | None = None,
) -> None:
    """Load a model on the meta device from `files` with exactly its tensors; floating-point ones become `dtype`.

    `layout` says where the model's tensors are in a file that has others; rows of a tensor stay views of it. `advance`
    is called with the bytes of each tensor. Raises SafetensorError for a damaged file.
    """
    tensors = {}
    for file in files:
        for name, view in _views(file):
            for target, rows in ((name, view),) if layout is None else _pieces(view, layout.get(name, ())):
                tensors[target] = _placed(rows, dtype, device)
                advance(rows.nbytes)
    model.requires_grad_(False).load_state_dict(tensors, assign=True)
    model.to(device)


def _pieces(view: Tensor, pieces: Iterable[Piece]) -> Iterator[tuple[str, Tensor]]:
    """Names and rows; halves in the other order are a copy, which only a few small layers are."""
    for piece in pieces:
        rows = view[piece.rows]
        yield piece.name, torch.cat(rows.chunk(2)[::-1]) if piece.is_swapped else rows


def _views(file: Path) -> list[tuple[str, Tensor]]:
    """Names and views in the file's order; the mapping lasts as long as any view."""
    with safe_open(file, framework="pt") as opened:
        views = [(name, opened.get_tensor(name)) for name in opened.keys()]  # noqa: SIM118 (no mapping)
    return sorted(views, key=lambda named: named[1].data_ptr())


def _placed(view: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    placed = view.to(device)  # to the dtype later: both at once would cast on the host
    if view.is_floating_point():
        placed = placed.to(dtype)
    if placed is view:  # each page is touched: otherwise the first step would read it from disk
        view.view(-1).view(torch.uint8)[:: mmap.PAGESIZE].sum()
    return placed
