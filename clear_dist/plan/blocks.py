"""Activations of a step as our blocks hold them (families/flux/blocks.py, engine/parts.py): what is alive at the peaks.

A unit is a number for each channel and token. Each function counts what is alive at once where it is most; tests count
the same on real tensors.
"""

from dataclasses import dataclass

from clear_dist.plan.kernels import attention_bytes
from clear_dist.plan.step import FLOAT32, Step

MLP = 4
"""Hidden channels of an MLP, in channels."""


@dataclass(frozen=True, kw_only=True)
class StepBytes:
    """What is alive where a step holds most, besides what is received and sent."""

    where: str
    activations: int
    attention: int
    """What attention holds for itself, its output and that of its parts included."""

    @property
    def total(self) -> int:
        return self.activations + self.attention


def step_bytes(step: Step) -> StepBytes:
    """Of the moment of a step at which most is alive."""
    rotary = 2 * step.tokens * step.request.model.head_dim * FLOAT32
    moments = (*_double_block(step), *_single_block(step))
    most = max(moments, key=lambda moment: moment.total)
    return StepBytes(where=most.where, activations=most.activations + rotary, attention=most.attention)


def _double_block(step: Step) -> tuple[StepBytes, ...]:
    tokens, chunk = step.tokens, max(step.chunk_of(step.part.tokens), step.chunk_of(step.own_text))
    heads = step.bytes_of(step.text_elsewhere, 3)
    # The input with the attention's, what the MLP is given, its hidden state, and that before or after.
    after = 2 + MLP + max(_activated(step), _quantised(step, MLP))
    later = step.bytes_of(chunk, _activated(step))
    mlp = step.bytes_of(chunk, after) + _unpacked(step, MLP, later) + _adapted(step, chunk, MLP)
    return (
        _moment("projections", step.bytes_of(tokens, 4) + heads + _projections(step, chunk)),
        _moment("attention", step.bytes_of(tokens, 4) + heads, attention_bytes(step)),
        _moment("MLP", step.bytes_of(tokens, 3) + mlp),
    )


def _single_block(step: Step) -> tuple[StepBytes, ...]:
    tokens = step.tokens
    chunk, heads = step.chunk_of(tokens), step.bytes_of(step.text_elsewhere, 3)
    mlp = step.bytes_of(chunk, 1 + (1 + MLP) + MLP + _activated(step))
    mlp += _unpacked(step, MLP, step.bytes_of(chunk, MLP + _activated(step))) + _adapted(step, chunk, MLP)
    last = step.bytes_of(chunk, (1 + MLP) + max(2.0, _quantised(step, 1 + MLP)))
    last += _unpacked(step, 1 + MLP, step.bytes_of(chunk, 2)) + _adapted(step, chunk, 1)
    projections = _moment("projections", step.bytes_of(tokens, 4) + heads + _projections(step, chunk))
    projection = _moment("projection", step.bytes_of(tokens, 3) + last)
    if chunk == tokens:  # the MLP is computed while halos travel
        beside = step.bytes_of(chunk, 1 + MLP)
        return (
            projections,
            _moment("MLP", step.bytes_of(tokens, 4) + heads + mlp),
            _moment("attention", step.bytes_of(tokens, 4) + heads + beside, attention_bytes(step)),
            projection,
        )
    return (
        projections,
        _moment("attention", step.bytes_of(tokens, 4) + heads, attention_bytes(step)),
        _moment("MLP", step.bytes_of(tokens, 3) + mlp),
        projection,
    )


def _moment(where: str, activations: int, attention: int = 0) -> StepBytes:
    return StepBytes(where=where, activations=activations, attention=attention)


def _projections(step: Step, chunk: int) -> int:
    """Of a chunk, from its norm to its queries, besides queries, keys and values of all tokens."""
    rotating = _rotating(step)
    return step.bytes_of(chunk, rotating) + _unpacked(step, 1, step.bytes_of(chunk, rotating - 1))


def _activated(step: Step) -> int:
    """Units of an MLP's hidden state after its activation function, before which it is alive too."""
    return 0 if step.request.compile else MLP


def _unpacked(step: Step, squares: int, later: int) -> int:
    """Of int8 weights of so many channels^2 while they become numbers again, beyond what is counted and comes later.

    Args:
        later: what comes of the product, which is not there yet.
    """
    if not step.request.int8:
        return 0
    size = step.request.itemsize
    copies = FLOAT32 + size * (size < FLOAT32)
    return max(0, squares * step.request.model.channels**2 * copies - later)


def _adapted(step: Step, chunk: int, outputs: int) -> int:
    """What a LoRA adds to so many channels of a product: its own, that by its weight, and the sum with the product."""
    if not step.request.lora_numbers:
        return 0
    counted = 2 if outputs == 1 else 1 + _activated(step) // MLP
    return step.bytes_of(chunk, outputs * (3 - counted))


def _rotating(step: Step) -> float:
    """Units of a chunk, from its norm to queries that are turned by their positions in float32."""
    size = step.request.itemsize
    if step.request.compile:
        return 2.0
    rotated = 2 + 3 * FLOAT32 / size if size < FLOAT32 else 5
    return 1 + max(rotated, _quantised(step, 1))


def _quantised(step: Step, inputs: int) -> float:
    """Units of what a layer in float8 holds of its `inputs`, in channels, besides them: two copies in float32."""
    if not step.request.float8:
        return 0.0
    copies = 1 if step.request.compile else 2 * FLOAT32
    return inputs * copies / step.request.itemsize
