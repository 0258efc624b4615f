"""Prompts to embeddings on rank 0: all of them before the rest of the model is loaded, or each when its turn comes."""

from pathlib import Path
from typing import Any

import torch

from clear_dist import hub, loading, lora
from clear_dist.comm.ends import say
from clear_dist.config import Request
from clear_dist.progress import Phases
from clear_dist.text import NOTHING, Encoded, encode


def encode_ahead(request: Request, device: torch.device, phases: Phases) -> list[Encoded]:
    """Of each prompt, in host memory (FLUX.1-dev: 4.2 MB); the text encoders are gone from `device` when this returns.

    Raises:
        Refusal: weights of a text encoder are missing, or do not fit their configuration.
    """
    with phases.phase("load", detail=" text encoders"):
        pipe = loading.load_text_pipeline(
            Path(request.model), dtype=getattr(torch, request.dtype), device=device, phases=phases
        )
        lora.load(pipe, hub.local_loras(request))
    with phases.phase("text", detail="s" if len(request.prompts) > 1 else ""):
        negative = _negative(pipe, request)
        encoded = [_positive(pipe, request, prompt) + negative for prompt in request.prompts]
    del pipe
    loading.free(device)
    return encoded


def encode_prompt(pipe: Any, request: Request, prompt: str) -> Encoded:
    """As one of `encode_ahead`, by a pipeline that has its text encoders."""
    return _positive(pipe, request, prompt) + _negative(pipe, request)


def _positive(pipe: Any, request: Request, prompt: str) -> Encoded:
    for line in loading.cut_off(pipe, prompt, request.max_sequence_length):
        say(f"warning: {line}")
    return _on_host(encode(pipe, [prompt], request.max_sequence_length))


def _negative(pipe: Any, request: Request) -> Encoded:
    guided = max(stage.sampling.passes for stage in request.stages) > 1
    if request.negative_prompt is None or not guided:
        return NOTHING
    return _on_host(encode(pipe, [request.negative_prompt], request.max_sequence_length))


def _on_host(encoded: Encoded) -> Encoded:
    return [None if tensor is None else tensor.cpu() for tensor in encoded]
