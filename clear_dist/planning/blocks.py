"""Activations of a step as our blocks hold them (models/flux_blocks.py, models/parts.py): what is alive at their peaks.

A unit is a number for each channel and token. Each function counts what is alive at once where it is most; tests count
the same on real tensors.
"""

from dataclasses import dataclass

from clear_dist.planning.kernels import attention_bytes
from clear_dist.planning.step import FLOAT32, Step

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
    tokens, chunk = step.tokens, max(step.chunk_of(step.part.tokens), step.text)
    # The input with the attention's, what the MLP is given, its hidden state, and that before or after.
    after = 2 + MLP + max(0 if step.request.compile else MLP, _quantised(step, MLP))
    return (
        _moment("projections", step.bytes_of(tokens, 4) + step.bytes_of(chunk, _rotating(step))),
        _moment("attention", step.bytes_of(tokens, 4), attention_bytes(step)),
        _moment("MLP", step.bytes_of(tokens, 3) + step.bytes_of(chunk, after)),
    )


def _single_block(step: Step) -> tuple[StepBytes, ...]:
    tokens = step.tokens
    chunk = step.chunk_of(tokens)
    widened = 1 + (1 + MLP) + MLP + (0 if step.request.compile else MLP)
    projections = _moment("projections", step.bytes_of(tokens, 4) + step.bytes_of(chunk, _rotating(step)))
    last = (1 + MLP) + max(2.0, _quantised(step, 1 + MLP))
    if chunk == tokens:  # the MLP is computed while halos travel
        beside = 1 + MLP
        return (
            projections,
            _moment("MLP", step.bytes_of(tokens, 4 + widened)),
            _moment("attention", step.bytes_of(tokens, 4 + beside), attention_bytes(step)),
            _moment("projection", step.bytes_of(tokens, 3 + last)),
        )
    return (
        projections,
        _moment("attention", step.bytes_of(tokens, 4), attention_bytes(step)),
        _moment("MLP", step.bytes_of(tokens, 3) + step.bytes_of(chunk, widened)),
        _moment("projection", step.bytes_of(tokens, 3) + step.bytes_of(chunk, last)),
    )


def _moment(where: str, activations: int, attention: int = 0) -> StepBytes:
    return StepBytes(where=where, activations=activations, attention=attention)


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
