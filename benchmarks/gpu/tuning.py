"""The part of suite.py that times what was chosen from counts: tiles, the VAE's attention, graphs, kernels of our own.

`python -m benchmarks.gpu.tilings --measured FOLDER/tuning.json --table clear_dist/attention/tilings.json` puts the
fastest tiles into the kernel's table.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from diffusers import FluxPipeline
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.session import Session, first_line
from benchmarks.gpu.speed import RADII, REPETITIONS, model_of
from benchmarks.lib.counts import TOKEN, Model
from benchmarks.lib.layer import interleaved, make_layer
from benchmarks.lib.share import on_stripes
from benchmarks.lib.steps import Candidate, make_pipeline
from benchmarks.lib.steps import interleaved as interleaved_steps
from clear_dist.attention.backend import WindowCall
from clear_dist.attention.triton_window import Tiling, architecture, launch_options
from clear_dist.comm.group import Group
from clear_dist.engine.parts import Parts
from clear_dist.engine.striped import require_striped
from clear_dist.vae import MAX_BYTES, attended
from clear_dist.vae.stripe_ops import FUSED

SIDE, SMALL_SIDE = 1024, 128
"""Pixels: where launches rule."""
STEPS_BEFORE = 5
"""Untimed steps of a generation: the second is captured where four are to come."""
VAE_HEAD, VAE_SCALE = 512, 8


def tuning(session: Session) -> None:
    """Time the candidates of each choice beside each other."""
    model, side = model_of(session), SMALL_SIDE if session.small else SIDE
    with torch.inference_mode():
        if session.device.type == "cuda":
            time_tilings(session, model, side)
        time_vae(session, side)
    time_launching(session, model, side)


def tell_times(session: Session, rows: list[dict[str, Any]], makers: list[Callable[[], Any]]) -> None:
    """A row with seconds for each that runs, with a note for each that does not."""
    runnable: list[tuple[dict[str, Any], Callable[[], Any]]] = []
    for row, candidate in zip(rows, makers, strict=True):
        try:
            candidate()  # compiles
        except Exception as error:
            session.journal.tell(**row, note=first_line(error))
        else:
            runnable.append((row, candidate))
    times = interleaved([candidate for _, candidate in runnable], REPETITIONS)
    for (row, _), seconds in zip(runnable, times, strict=True):
        session.journal.tell(**row, seconds=seconds)


def time_tilings(session: Session, model: Model, side: int) -> None:
    """The tiles that `tilings.py` compiles for heads of this model, on one layer at the paper's own radius."""
    from benchmarks.gpu.tilings import SMS, candidates
    from clear_dist.attention.triton_kernel import window_kernel

    shape = {"text": model.text_tokens, "heads": model.heads, "head_dim": model.head_dim}
    layer = make_layer(side // TOKEN, **shape, dtype=session.dtype, device=session.device)
    (_, query), (key_text, key), (value_text, value) = (layer.split(x) for x in (layer.query, layer.key, layer.value))
    call = WindowCall(
        query=query, key=key, value=value, key_text=key_text, value_text=value_text,
        radius=RADII[0], row_offset=0, scale=model.head_dim**-0.5,
    )  # fmt: skip
    out, lse = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)

    def launcher(tiling: Tiling) -> Callable[[], Any]:
        grid, arguments, options = launch_options(call, out, lse, tiling, extends=False)
        return lambda: window_kernel[grid](*arguments, **options)

    here = architecture("cuda")
    limits = SMS[max((known for known in SMS if known <= here), default=min(SMS))]
    key_bytes = 2 * model.head_dim
    tried = candidates(stages=3 if limits.program > 99 else 2)[key_bytes]
    about = {"what": "tiles", "architecture": here, "key_bytes": key_bytes, "side_px": side, "radius": RADII[0]}
    tell_times(session, [about | {"tiling": asdict(each)} for each in tried], [launcher(each) for each in tried])


def time_vae(session: Session, side: int) -> None:
    """The VAE's attention of one picture: by products of blocks, and by PyTorch's fused kernels."""
    query, key, value = (
        torch.randn((side // VAE_SCALE) ** 2, VAE_HEAD, device=session.device, dtype=session.dtype) for _ in range(3)
    )
    out, buffers = torch.empty_like(query), attended.Buffers.like(query, MAX_BYTES[session.device.type])

    def fused() -> torch.Tensor:
        with sdpa_kernel(list(FUSED)):
            return scaled_dot_product_attention(query[None, None], key[None, None], value[None, None])

    ways = {"products of blocks": lambda: attended.attend(query, key, value, out, buffers), "fused": fused}
    about = {"what": "the VAE's attention", "side_px": side}
    tell_times(session, [about | {"candidate": name} for name in ways], list(ways.values()))


def time_launching(session: Session, model: Model, side: int) -> None:
    """A step by a CUDA graph, kernel by kernel, and with PyTorch's operations between products."""
    try:
        pipe = make_pipeline(model, session.device, session.dtype)
    except torch.OutOfMemoryError as error:
        session.journal.tell(what="a step", side_px=side, note=first_line(error))
        return
    group = Group.create(session.device)
    ours = partial(on_stripes, pipe, RADII[0], "sync", group, attention_backend=session.backend)

    @contextmanager
    def by_torch() -> Iterator[FluxPipeline]:
        with ours(cuda_graphs="off") as striped:
            require_striped(striped).parts = Parts()
            yield striped

    ways: dict[str, Any] = {
        "as a graph": partial(ours, cuda_graphs="auto"),
        "kernel by kernel": partial(ours, cuda_graphs="off"),
        "kernel by kernel, torch between products": by_torch,
    }
    candidates = [Candidate(prepare=way, side=side, unmeasured=STEPS_BEFORE) for way in ways.values()]
    found = interleaved_steps(candidates, group, model.text_tokens, REPETITIONS)
    for name, runs in zip(ways, found, strict=True):
        row = {"what": "a step", "side_px": side, "candidate": name}
        session.journal.tell(**row, **({"note": runs.error} if runs.error else {"seconds": runs.seconds}))
    group.close()
