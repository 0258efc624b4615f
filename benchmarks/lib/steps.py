"""Seconds of denoising steps of a FLUX with random weights; candidates take turns on one rank or several.

The pipeline is diffusers' own without text encoders and VAE: a step is the transformer and the scheduler. Compilation
falls into the first step of a generation, which is not timed.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from benchmarks.lib.counts import Model
from clear_dist.comm.group import Group
from clear_dist.observe.peaks import peak_memory, reset_peak_memory

SMALL = Model(double_blocks=1, single_blocks=2, heads=4, head_dim=64, text_tokens=64, itemsize=4)
"""A small FLUX for CPUs."""
ROTARY_AXES = {64: (16, 24, 24), 128: (16, 56, 56)}
"""Axes of the rotary embedding, by head dim."""
PROMPT_CHANNELS, POOLED_CHANNELS = 4096, 768
LONGEST_SIDE_OF_PRODUCT = {"cuda": 8192, "cpu": 2048}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A pipeline whose steps are timed."""

    prepare: Callable[[], AbstractContextManager[FluxPipeline]]
    """Context with the pipeline as it is timed; its exit undoes the changes."""
    side: int
    """Side of the image in pixels."""
    processes: int = 1
    """Number of ranks that run it together, the first ones."""
    unmeasured: int = 1
    """Steps at the start of a generation that plan, allocate and, in the stale schedule, fill the buffers."""
    may_fail: bool = True
    """False if an error on one rank would leave others waiting: it ends the benchmark."""


@dataclass
class Runs:
    """Results of one candidate."""

    seconds: list[float] = field(default_factory=list)
    """Seconds of a step on rank 0, one for each repetition."""
    peak_bytes: int = 0
    """Highest memory of any rank: allocated on CUDA; resident on a CPU, with libraries and weights."""
    error: str = ""
    """First line of the error."""

    @property
    def median(self) -> float:
        return median(self.seconds)


def config_of(model: Model) -> dict[str, Any]:
    """Arguments of its FluxTransformer2DModel."""
    return {
        "in_channels": model.output_channels,
        "num_layers": model.double_blocks,
        "num_single_layers": model.single_blocks,
        "num_attention_heads": model.heads,
        "attention_head_dim": model.head_dim,
        "axes_dims_rope": ROTARY_AXES[model.head_dim],
        "joint_attention_dim": PROMPT_CHANNELS,
        "pooled_projection_dim": POOLED_CHANNELS,
        "guidance_embeds": True,
    }


def make_pipeline(model: Model, device: torch.device, dtype: torch.dtype) -> FluxPipeline:
    """A FLUX with random weights, equal in every process."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # FLUX.1-dev would take 48 GB in float32
    try:
        with device:
            transformer = FluxTransformer2DModel(**config_of(model))
    finally:
        torch.set_default_dtype(default)
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxPipeline(
        transformer=transformer.eval().requires_grad_(False), scheduler=FlowMatchEulerDiscreteScheduler(), **parts
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(
    pipe: FluxPipeline, text_tokens: int, side: int, steps: int, after_step: Callable[[], None] = lambda: None
) -> Tensor:
    """Packed latents [1, L, C] of one generation, from the same embeddings and noise each time."""
    device, dtype = pipe.transformer.device, pipe.transformer.dtype
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randn(1, text_tokens, PROMPT_CHANNELS, generator=generator)
    pooled = torch.randn(1, POOLED_CHANNELS, generator=generator)

    def end_step(pipeline: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        after_step()
        return {}

    with torch.inference_mode():
        return pipe(
            prompt_embeds=prompt.to(device, dtype),
            pooled_prompt_embeds=pooled.to(device, dtype),
            height=side,
            width=side,
            num_inference_steps=steps,
            generator=generator,
            output_type="latent",
            callback_on_step_end=end_step,
        ).images


def run_steps(pipe: FluxPipeline, text_tokens: int, candidate: Candidate) -> tuple[float, int]:
    """Seconds of a generation's last step, and the generation's peak memory in bytes."""
    device = pipe.transformer.device
    ends: list[float] = []

    def end_step() -> None:
        synchronize(device)
        ends.append(time.perf_counter())

    reset_peak_memory(device)
    draw(pipe, text_tokens, candidate.side, candidate.unmeasured + 1, end_step)
    return ends[-1] - ends[-2], peak_memory(device)


def interleaved(candidates: Sequence[Candidate], world: Group, text_tokens: int, repetitions: int) -> list[Runs]:
    """Results of all candidates, each run once in every repetition; all ranks call this."""
    found = [Runs() for _ in candidates]
    for _ in range(repetitions):
        for candidate, runs in zip(candidates, found, strict=True):
            if runs.error:
                continue
            mine = attempt(candidate, text_tokens) if world.rank < candidate.processes else None
            everyone = [result for result in world.gather_objects(mine) if result is not None]
            errors = [result for result in everyone if isinstance(result, str)]
            if errors:
                runs.error = errors[0]
            else:
                runs.seconds.append(everyone[0][0])
                runs.peak_bytes = max(runs.peak_bytes, *(peak for _, peak in everyone))
    return found


def attempt(candidate: Candidate, text_tokens: int) -> tuple[float, int] | str:
    """Seconds and peak bytes of one run, or the first line of its error."""
    try:
        with candidate.prepare() as pipe:
            return run_steps(pipe, text_tokens, candidate)
    except Exception as error:
        if not candidate.may_fail:
            raise
        failure = "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"{type(error).__name__}: {error}"
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return failure.splitlines()[0]


def peak_rate(device: torch.device, dtype: torch.dtype, repetitions: int = 5) -> float:
    """FLOP/s of a large product of matrices, the best of all repetitions."""
    side = LONGEST_SIDE_OF_PRODUCT[device.type]
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    seconds = []
    for _ in range(repetitions + 1):
        synchronize(device)
        began = time.perf_counter()
        matrix @ matrix
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
