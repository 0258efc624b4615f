"""The parts of suite.py that check whether a GPU computes what it should: correctness and ranks."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor

from benchmarks.gpu.session import Session, first_line
from benchmarks.lib.counts import Window
from benchmarks.lib.layer import make_layer, row_major
from benchmarks.lib.share import on_stripes
from benchmarks.lib.steps import SMALL, draw, make_pipeline
from clear_dist.attention import BACKENDS, attend, choose_backend, window_attention
from clear_dist.comm.group import Group
from clear_dist.launch import ranks as launch
from clear_dist.options import Schedule, TextTokens

BFLOAT16_ERROR, FLOAT32_ERROR = 1e-2, 1e-4
"""Bounds of the relative error in the Euclidean norm; bfloat16 attention is right to 1e-3 to 1e-2."""
CASES = (
    # rows, rows of keys, columns, row offset, text tokens, radius
    (13, 29, 37, 7, 77, 9),
    (5, 20, 33, 15, 1, 4),
    (16, 16, 16, 0, 512, 40),
    (24, 54, 64, 15, 512, 16),
    (64, 64, 64, 0, 512, 8),
    (64, 64, 64, 0, 512, 16),
    (64, 64, 64, 0, 512, 32),
)
HEADS, HEAD_DIM, OTHER_HEAD_DIM = 2, 128, 64
WEIGHT_SCALE = 2.0
SIDE, STEPS = 208, 2
"""13 rows of tokens, a prime number, so that stripes differ."""


def relative_error(found: Tensor, expected: Tensor) -> float:
    difference = found.detach().cpu().double() - expected.detach().cpu().double()
    return (difference.norm() / expected.detach().cpu().double().norm()).item()


def correctness(session: Session) -> None:
    """Check every backend, full attention with its log-sum-exp, the official layout, and a whole small model."""
    torch.manual_seed(0)
    with torch.inference_mode():
        for case in CASES[:2] if session.small else CASES:
            check_backends(case, HEAD_DIM, session)
        for case in CASES[:2]:
            check_backends(case, OTHER_HEAD_DIM, session)
        check_full(session)
        if session.device.type == "cuda":
            check_row_major(session)
    check_model(session)


def check_backends(case: Sequence[int], head_dim: int, session: Session) -> None:
    rows, key_rows, columns, row_offset, text, radius = case
    image, tail = [(1, rows, columns), (1, key_rows, columns), (1, key_rows, columns)], (HEADS, head_dim)
    shapes = [(*shape, *tail) for shape in (*image, (1, text), (1, text))]
    tensors = [torch.randn(shape, device=session.device, dtype=torch.bfloat16) for shape in shapes]
    call = {"radius": radius, "row_offset": row_offset}
    expected = window_output(*(x.float() for x in tensors), **call, backend="reference")
    for name in BACKENDS:
        row: dict[str, Any] = {"backend": name, "case": str(case), "head_dim": head_dim}
        try:
            choose_backend(name, device=session.device, dtype=torch.bfloat16, head_dim=head_dim)
        except ValueError as reason:  # not here
            session.journal.tell(**row, note=first_line(reason))
            continue
        try:
            error = relative_error(window_output(*tensors, **call, backend=name), expected)
            row |= {"relative_error": error, "passed": error <= BFLOAT16_ERROR}
        except Exception as failure:
            row |= {"passed": False, "note": first_line(failure)}
        session.journal.tell(**row)


def window_output(*tensors: Tensor, radius: int, row_offset: int, backend: str) -> Tensor:
    return window_attention(*tensors, radius=radius, row_offset=row_offset, backend=BACKENDS[backend])[0]


def check_full(session: Session) -> None:
    """Check the text queries' attention against its definition in float64."""
    tokens = 500 if session.small else 5000
    query, key, value = (
        torch.randn(1, length, HEADS, HEAD_DIM, device=session.device, dtype=torch.bfloat16)
        for length in (77, tokens, tokens)
    )
    score = torch.einsum("blnd,bsnd->bnls", query.double(), key.double()) * HEAD_DIM**-0.5
    expected = torch.einsum("bnls,bsnd->blnd", score.softmax(-1), value.double())
    out, lse = attend(query, key, value)
    errors = relative_error(out, expected), relative_error(lse, score.logsumexp(-1).transpose(1, 2))
    for what, error in zip(("attend", "attend's log-sum-exp"), errors, strict=True):
        session.journal.tell(backend=what, relative_error=error, passed=error <= BFLOAT16_ERROR)


def check_row_major(session: Session) -> None:
    """Check the stand-in for the official code in `kernels` and `steps`."""
    layer = make_layer(40, text=77, heads=HEADS, head_dim=HEAD_DIM, dtype=torch.bfloat16, device=session.device)
    image, text = zip(*(layer.split(x.float())[::-1] for x in (layer.query, layer.key, layer.value)), strict=True)
    expected = window_output(*image, *text[1:], radius=9, row_offset=0, backend="reference")
    error = relative_error(layer.split(row_major(layer, 9)())[1], expected)
    session.journal.tell(backend="row-major FlexAttention", relative_error=error, passed=error <= BFLOAT16_ERROR)


def check_model(session: Session) -> None:
    """Check a small FLUX on the device against the CPU, in float32; in bfloat16 the error is only recorded."""
    pipe = make_sensitive_pipeline()
    expected = draw_alone(pipe, 4, attention_backend="reference")
    full = draw_alone(pipe, "full")
    session.journal.tell(model="what the window changes, for comparison", relative_error=relative_error(full, expected))
    for dtype, bound in ((torch.float32, FLOAT32_ERROR), (torch.bfloat16, None)):
        move(pipe, session.device, dtype)
        error = relative_error(draw_alone(pipe, 4, attention_backend=session.backend), expected)
        session.journal.tell(model=str(dtype), relative_error=error, passed=bound and error <= bound)


def make_sensitive_pipeline() -> FluxPipeline:
    """A small FLUX on the CPU, equal in every process, with weights so large that attention matters."""
    pipe = make_pipeline(SMALL, torch.device("cpu"), torch.float32)
    for weight in pipe.transformer.parameters():
        weight.mul_(WEIGHT_SCALE)
    return pipe


def move(pipe: FluxPipeline, device: torch.device, dtype: torch.dtype) -> None:
    """Move the transformer without diffusers' warning about loss of precision."""
    torch.nn.Module.to(pipe.transformer, device, dtype)


def draw_alone(pipe: Any, window: Window, **settings: Any) -> Tensor:
    group = Group.create(pipe.transformer.device)
    with on_stripes(pipe, window, "sync", group, text_attention="exact", **settings):
        latents = draw(pipe, SMALL.text_tokens, SIDE, STEPS)
    group.close()
    return latents


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Settings of a drawing; in all but the stale schedule one rank alone draws the same."""

    window: Window
    schedule: Schedule = "sync"
    dtype: torch.dtype = torch.float32
    hoist_modulation: bool = False
    text_tokens: TextTokens = "auto"
    """auto replicates them where ranks talk through host memory."""

    @property
    def bound(self) -> float | None:
        """Bound of the relative error; None where it is only recorded."""
        return FLOAT32_ERROR if self.dtype == torch.float32 and self.schedule == "sync" else None


DRAWINGS = (
    Drawing(window=4),
    Drawing(window="full"),
    Drawing(window=4, hoist_modulation=True),
    Drawing(window=4, text_tokens="sharded"),
    Drawing(window="full", text_tokens="sharded"),
    Drawing(window=4, schedule="stale"),
    Drawing(window=4, dtype=torch.bfloat16),  # the last one: weights are rounded
)


def ranks(session: Session) -> None:
    """Check 2 and 3 ranks that share the GPU through host memory against one, which on CUDA uses NCCL."""
    drawn: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in (2, 3, 1):  # the last one in this process, which cannot be forked after it has computed
            file = Path(folder) / f"{number}.pt"
            job = partial(draw_on_rank, session.device.type, file)
            status = launch.run(job, nproc=number, on_cuda=session.device.type == "cuda", traceback=True)
            drawn[number] = torch.load(file, weights_only=True) if status == 0 else None
            if status:
                session.journal.tell(ranks=number, passed=False, note=f"ended with status {status}; see the output")
    alone = drawn.pop(1)
    assert alone is not None, "one rank has failed: there is nothing to compare with"
    session.journal.tell(ranks=1, transport=alone["transport"])
    plain, hoisted = alone["latents"][0], alone["latents"][2]
    session.journal.tell(ranks=1, what="hoisted modulation, to the bit", passed=torch.equal(plain, hoisted))
    for number, found in drawn.items():
        for drawing, mine, expected in zip(DRAWINGS, found["latents"] if found else (), alone["latents"], strict=False):
            error = relative_error(mine, expected)
            passed = drawing.bound and error <= drawing.bound
            row = {"ranks": number, "transport": found["transport"], "what": str(drawing)}
            session.journal.tell(**row, relative_error=error, passed=passed)


def draw_on_rank(device_type: str, file: Path) -> None:
    """The work of each rank; the first one saves the latents."""
    group = Group.create(device_type, share_gpus=True)
    pipe, latents = make_sensitive_pipeline(), []
    for drawing in DRAWINGS:
        move(pipe, group.device, drawing.dtype)
        settings = {"hoist_modulation": drawing.hoist_modulation, "text_tokens": drawing.text_tokens}
        with on_stripes(pipe, drawing.window, drawing.schedule, group, text_attention="exact", **settings):
            latents.append(draw(pipe, SMALL.text_tokens, SIDE, STEPS).cpu())
    if group.rank == 0:
        torch.save({"transport": group.transport, "latents": latents}, file)
    group.barrier()
    group.close()
