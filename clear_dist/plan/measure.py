"""What the engine takes, told by the engine: it runs here as one rank of many, on tensors without values.

This is a process of its own. The one that plans asks it, a line of JSON each on standard input, and reads answers on
standard output: that one may be about to fork its ranks, and imports no torch.
"""

import json
import sys
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from clear_dist.comm.pretend import META, Pretended, Tally
from clear_dist.engine.strided import scale_of, with_stride
from clear_dist.geometry import Rows
from clear_dist.launch import ends
from clear_dist.plan.allocated import ATTENTION, Allocated
from clear_dist.plan.built import Built, count_weights, cut_down, load
from clear_dist.plan.questions import Question, StepQuestion, VaeQuestion, WeightsQuestion, as_json, from_json
from clear_dist.plan.stepped import run_steps
from clear_dist.vae import MAX_BYTES, decode_stripes, encode_stripes
from clear_dist.vae.stripe_ops import BYTES_PER_VALUE

ATTENDING = ("_attention", "StripeOps.attend", "StripeOps._gather", "StripeJoin.join")
"""Functions that hold rows of the whole picture."""
CHUNKS = 3
"""From this many on, each row adds the same to what the VAE holds."""


def main() -> None:
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = {"answer": answered(from_json(json.loads(line)))}
        except Exception as error:  # a model may be unfit in any way
            answer = {"error": f"the model cannot be planned: {ends.describe(error)}"}
        print(json.dumps(answer), flush=True)


def answered(question: Question) -> dict[str, Any]:
    """Raises ValueError where the module cannot be made."""
    if isinstance(question, VaeQuestion):
        return of_vae(question)
    if isinstance(question, StepQuestion):
        return run_steps(question, _cut_down(_key(question)).copy())
    assert isinstance(question, WeightsQuestion), question
    group = Pretended.of(0, question.ranks, "gloo")
    return count_weights(_cut_down(_key(question)).copy(), question.options, question.device, group)


def of_vae(question: VaeQuestion) -> dict[str, Any]:
    """An encode or decode of a stripe; one of many chunks of rows follows from those of a few, along straight lines."""
    module = _module(_key(question))
    weights = {"weights": sum(x.nbytes for x in module.parameters())}
    if question.rows == 0:
        return weights | {"bytes": {}, "operations": {}}
    few = rows_of_chunks(question, module)
    if question.rows < few:
        found = dict(_stripe(_line(question)))
        return {"peak": max(found.pop("peaks").values())} | weights | found

    sizes = ((few, 1), (2 * few, _together(question)))
    low, high = (_stripe(_line(replace(question, rows=rows, ranks=ranks))) for rows, ranks in sizes)
    return weights | grown(question, few, low, high)


def _together(question: VaeQuestion) -> int:
    """Ranks that are enough to see what many do: the middle one of three has all neighbours that there may be."""
    return min(3, question.ranks)


def rows_of_chunks(question: VaeQuestion, module: Any) -> int:
    """Rows of latents that are `CHUNKS` chunks at the size of the last blocks, the pictures' own but for a stride."""
    scale = 2 ** (len(module.config.block_out_channels) - 1)
    row = question.images * scale * question.columns * 2 * module.config.block_out_channels[0] * BYTES_PER_VALUE
    return -(-CHUNKS * max(1, MAX_BYTES[question.device] // row) // scale)


def grown(question: VaeQuestion, few: int, low: Any, high: Any) -> dict[str, Any]:
    """What a stripe takes, by one of `few` rows alone, and one twice as high among as many as three."""
    times, ranks, attending = question.rows / few, question.ranks, _of_others(question)
    further = 2 * _together(question) - 1

    def line(name: str, kind: str) -> int:
        first, second = (each[kind].get(name, 0) for each in (low, high))
        others = attending[name] * few * question.columns if kind == "peaks" and name in attending else 0.0
        return round(first + (second - first - further * others) * (times - 1) + others * (ranks * times - 1))

    operations = {name: line(name, "operations") for name in low["operations"]}
    if ATTENTION in operations:  # each row to all
        operations[ATTENTION] = round(low["operations"][ATTENTION] * times**2 * ranks)
    sent = low["bytes"]
    if ranks > 1:
        sent = high["bytes"] | {"join_bytes": round(high["bytes"]["join_bytes"] * times / 2)}
    return {
        "peak": max(line(where, "peaks") for where in high["peaks"]),
        "bytes": sent,
        "operations": operations,
    }


def _of_others(question: VaeQuestion) -> dict[str, float]:
    """Bytes that each position of the whole picture adds, by function at work: keys and values of attention."""
    narrow = replace(question, rows=8, columns=16)
    alone, in_three = (_stripe(_line(replace(narrow, ranks=ranks)))["peaks"] for ranks in (1, 3))
    positions = 2 * narrow.rows * narrow.columns
    return {where: (in_three[where] - alone[where]) / positions for where in ATTENDING if where in alone}


@cache
def _stripe(line: str) -> dict[str, Any]:
    question: VaeQuestion = from_json(json.loads(line))
    module = _module(_key(question))
    group, tally = Pretended.of(question.ranks // 2, question.ranks, "gloo"), Tally()
    stripes = tuple(Rows(question.rows * rank, question.rows * (rank + 1)) for rank in range(question.ranks))
    rest: dict[str, Any] = {"max_bytes": MAX_BYTES[question.device], "counters": tally}
    rest["by_products"] = question.device == "cuda" and question.dtype != "float32"
    scale = scale_of(module)
    pixels = scale * question.rows, scale * question.columns
    with torch.no_grad(), Allocated("VAE activations") as allocated:
        if question.encode:
            encode_stripes(module, _empty(question, 3, *pixels), group, stripes, **rest)
        else:
            latents = _empty(question, module.config.latent_channels, question.rows, question.columns)
            decode_stripes(module, latents, group, stripes, **rest)
    return {
        "peaks": dict(allocated.peaks),
        "bytes": dict(tally.sums),
        "operations": {kind: amount for (_, kind), amount in allocated.operations.items()},
    }


def _line(question: Question) -> str:
    return json.dumps(as_json(question))


def _empty(question: VaeQuestion, *shape: int) -> Tensor:
    return torch.empty(question.images, *shape, dtype=getattr(torch, question.dtype), device=META)


def _key(question: Question) -> tuple[str, str, str]:
    return question.module.kind, json.dumps(question.module.config), question.dtype


@cache
def _module(key: tuple[str, str, str]) -> Any:
    kind, config, dtype = key
    module = load(kind, json.loads(config), dtype)
    return with_stride(module) if isinstance(module, AutoencoderKL) else module


@cache
def _cut_down(key: tuple[str, str, str]) -> Built:
    kind, config, dtype = key
    return cut_down(load(kind, json.loads(config), dtype))
