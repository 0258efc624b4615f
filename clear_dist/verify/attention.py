"""Attention backends: `reference` against the definition in float64, the others against `reference`.

Shapes: B batch, R rows of queries, E rows of keys, W columns, N heads, T text tokens, D head dim.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isnan

import torch
from torch import Tensor

from clear_dist.attention import Backend, window_attention
from clear_dist.attention.backend import CallShape, is_before_ampere
from clear_dist.comm.group import Group
from clear_dist.launch.ends import describe
from clear_dist.verify.dense import attention, circle, largest_error
from clear_dist.verify.finding import Finding, Subjects

BATCH, HEADS, HEAD_DIM = 1, 2, 64
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""bfloat16 has 8 bits: the softmax's weights and the outputs are each rounded by up to 2^-9 of their size."""


@dataclass(frozen=True)
class Case:
    """One call, in tokens."""

    rows: int
    key_rows: int
    columns: int
    row_offset: int
    text: int
    radius: int

    def tensors(self, seed: int) -> tuple[Tensor, ...]:
        """Query, key, value, text key, text value: CPU, float32, equal on all ranks."""
        generator = torch.Generator().manual_seed(seed)
        image = [(BATCH, rows, self.columns, HEADS, HEAD_DIM) for rows in (self.rows, self.key_rows, self.key_rows)]
        text = [(BATCH, self.text, HEADS, HEAD_DIM)] * 2
        return tuple(torch.randn(shape, generator=generator) for shape in (*image, *text))


CASES = (
    Case(rows=13, key_rows=29, columns=37, row_offset=7, text=33, radius=9),
    Case(rows=5, key_rows=9, columns=18, row_offset=-5, text=0, radius=4),  # a halo below, which some rows do not reach
    Case(rows=16, key_rows=16, columns=16, row_offset=0, text=64, radius=40),  # wider than the image
)
CASES_TO_COMPILE = 2
"""Few: on a GPU kernels are compiled for each size and dtype, which takes seconds."""


def check_backends(group: Group, subjects: Subjects) -> Iterator[Finding]:
    """Every backend that can run on this device, in float32 and in 16 bits; one that raises has failed."""
    dtypes = torch.float32, half_of(group)
    for name, backend in subjects.backends.items():
        for dtype in dtypes:
            reason = backend.why_not_here(CallShape(group.device.type, dtype, HEAD_DIM))
            if group.agree(reason is not None):
                continue
            cases = CASES if group.device.type == "cpu" else CASES[:CASES_TO_COMPILE]
            error, fault = _largest_error(backend, subjects.backends["reference"], cases, dtype, group.device)
            against = "its definition" if name == "reference" else "reference"
            yield Finding(
                name=f"attention, {name}, {str(dtype).removeprefix('torch.')}",
                error=error,
                tolerance=TOLERANCE[dtype],
                figure=f"{len(cases)} cases against {against}",
                fault=fault,
            )


def half_of(group: Group) -> torch.dtype:
    """The 16-bit dtype that all ranks compute in."""
    return torch.float16 if group.agree(is_before_ampere(group.device.type)) else torch.bfloat16


def _largest_error(
    backend: Backend, reference: Backend, cases: Sequence[Case], dtype: torch.dtype, device: torch.device
) -> tuple[float, str]:
    worst, where = 0.0, ""
    for seed, case in enumerate(cases):
        tensors = tuple(tensor.to(device, dtype) for tensor in case.tensors(seed))
        try:
            found = _run(backend, case, tensors)
        except Exception as error:  # a kernel that cannot be compiled or launched here is what this is to find
            return float("inf"), f"{case} raised {describe(error)}"
        rounded = tuple(tensor.float() for tensor in tensors)
        if backend is reference:
            expected = _by_definition(case, tuple(tensor.cpu() for tensor in rounded))
        else:
            expected = _run(reference, case, rounded)
        for what, mine, right in zip(("output", "log-sum-exp"), found, expected, strict=True):
            error_here = _error(mine, right)
            if not error_here <= worst:
                worst, where = error_here, f"{what} of {case} is off by {error_here:.2g}"
            if isnan(worst):  # nothing compares with it
                return worst, where
    return worst, where


def _run(backend: Backend, case: Case, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    return window_attention(*tensors, radius=case.radius, row_offset=case.row_offset, backend=backend)


def _error(found: Tensor, expected: Tensor) -> float:
    """Error of finite numbers; infinite unless -inf (queries that see no key) is in the same places."""
    found, expected = found.detach().cpu(), expected.detach().cpu()
    if found.shape != expected.shape or not torch.equal(found.isneginf(), expected.isneginf()):
        return float("inf")
    finite = ~expected.isneginf()
    return largest_error(found[finite], expected[finite])


def _by_definition(case: Case, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    query, key, value, key_text, value_text = tensors
    seen = circle((case.rows, case.columns), case.key_rows, case.radius, case.row_offset)
    text = torch.ones(len(seen), case.text, dtype=torch.bool)
    keys = torch.cat([key_text, key.flatten(1, 2)], dim=1), torch.cat([value_text, value.flatten(1, 2)], dim=1)
    out, lse = attention(query.flatten(1, 2), *keys, torch.cat([text, seen], dim=1))
    blind = lse.isneginf().unsqueeze(-1)
    return out.masked_fill(blind, 0.0).reshape(query.shape), lse.reshape(query.shape[:-1])
