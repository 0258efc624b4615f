"""What a training step takes, counted on a model without values (the meta device): bytes, and operations.

Shapes: B pictures, N heads, L tokens, D head dim.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from clear_dist.comm.pretend import META
from clear_dist.engine.family import Inputs
from clear_dist.families.transformers import family_of
from clear_dist.plan.built import load
from clear_dist.plan.model import PlannedModel
from clear_dist.training.attention import Layout, Pattern
from clear_dist.training.student import Student


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Counts of one forward of `batch` pictures on one rank; weights are the whole model's."""

    frozen: int
    """Bytes, the teacher's own weights included."""
    trained: int
    """Numbers."""
    itemsize: int
    """Bytes of a number."""
    largest_block: int
    """Bytes."""
    saved: int
    """Bytes kept for the backward pass, without checkpoints."""
    checkpoints: int
    """Bytes of them: what each block begins with."""
    compared: int
    """Bytes of the teacher's attention outputs."""
    blocks: int
    products: int
    """Operations of products in a forward, of all weights."""
    trained_products: int
    """Those of weights that train."""
    student: int
    """Operations of the student's attention in a forward."""
    teacher: int
    """Those of the teacher's, full."""
    numbers: int
    """Channels x tokens x blocks, that pass through memory between products."""


class _Stand(torch.autograd.Function):
    """Attention that keeps what a fused kernel keeps for its backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class Standing:
    """A pattern in another's place: its parameters, and the operations of all layers added up."""

    def __init__(self, pattern: Any) -> None:
        self._pattern = pattern
        self.student = self.teacher = 0

    def parameters(self, layout: Layout, heads: int, head_dim: int) -> Mapping[str, Tensor]:
        return self._pattern.parameters(layout, heads, head_dim)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, parameters: Mapping[str, Tensor]
    ) -> Tensor:
        batch, heads, tokens, head_dim = query.shape
        text = tokens - layout.image
        self.student += batch * self._pattern.operations(layout, text, heads, head_dim)
        self.teacher += batch * 4 * heads * head_dim * tokens**2
        return _Stand.apply(query, key, value)

    def operations(self, layout: Layout, text: int, heads: int, head_dim: int) -> int:
        return self._pattern.operations(layout, text, heads, head_dim)


def count(
    model: PlannedModel,
    pattern: Pattern,
    grid: tuple[int, int],
    *,
    batch: int,
    text_tokens: int,
    dtype: str,
    teacher: str,
    every: int,
) -> Counted:
    """Raises ValueError where the model cannot be built."""
    transformer = load(model.transformer.kind, model.transformer.config, dtype)
    standing = Standing(pattern)
    student = Student.of(transformer, standing, grid, every=every, teacher=teacher)
    family = family_of(transformer)
    trained = student.trained.values()
    ids = {id(x) for x in trained}
    bytes_of = {id(x): x.nbytes for x in (*transformer.parameters(), *transformer.buffers())}
    inputs = family.empty_inputs(grid, images=batch, text_tokens=text_tokens)
    with META:
        saved, output = _saved(transformer, inputs)
        products = FlopCounterMode(display=False)
        with products, torch.no_grad():
            transformer(**inputs)
    del output
    tokens = grid[0] * grid[1] + text_tokens
    itemsize = getattr(torch, dtype).itemsize
    activations = batch * tokens * family.channels
    calls = 2
    return Counted(
        frozen=sum(size for each, size in bytes_of.items() if each not in ids),
        trained=sum(x.numel() for x in trained),
        itemsize=itemsize,
        largest_block=max(sum(x.nbytes for x in block.parameters()) for block in family.blocks),
        saved=saved,
        checkpoints=len(family.blocks) * activations * itemsize,
        compared=len(student.passes.compared) * activations * itemsize,
        blocks=len(family.blocks),
        products=products.get_total_flops(),
        trained_products=sum(2 * x.numel() for x in trained if x.ndim > 1) * batch * tokens,
        student=standing.student // calls,
        teacher=standing.teacher // calls,
        numbers=activations * len(family.blocks),
    )


def _saved(transformer: nn.Module, inputs: Inputs) -> tuple[int, Any]:
    """Bytes that a forward keeps for its backward pass besides weights, each tensor's memory once."""
    weights = {x.untyped_storage()._cdata for x in (*transformer.parameters(), *transformer.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()._cdata
        if storage not in weights:
            kept[storage] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = transformer(**inputs)
    return sum(x.untyped_storage().nbytes() for x in kept.values()), output
