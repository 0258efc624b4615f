"""On a CPU in float32: when are products by oneDNN faster than torch's own, and by how much?

    python -m benchmarks.speed.products --json products.json

Linear layers with and without GELU, as torch calls them and by `clear_dist.engine.on_cpu`; attention of a batch of
tiles, bands or sequences, by torch's fused kernel and by `clear_dist.attention.onednn`, whose thresholds are chosen by
the answer. The two take turns; figures are medians of the process's CPU time, which others on the machine disturb less
than a clock's, so threads are one by default.
"""

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.lib.flags import Parser, whole_number
from benchmarks.lib.machine import machine, save
from clear_dist.attention import onednn
from clear_dist.engine import on_cpu
from clear_dist.observe.peaks import keep_for_the_next_layer

HEADS = 2
ATTENTION = (
    ("8 x 8 tiles, radius 8", 16, 64, 484, True),
    ("16 x 16 tiles, radius 8", 8, 256, 900, True),
    ("8 x 8 tiles, radius 16", 8, 64, 1444, True),
    ("16 x 16 tiles, radius 16", 4, 256, 2116, True),
    ("band of 64 x 64", 1, 256, 4096, True),
    ("text keys", 1, 4096, 512, False),
    ("few text keys", 1, 4096, 32, False),
    ("text queries, a piece", 1, 512, 2048, False),
)
"""Name, batch, queries, keys, whether masked."""
LINEAR = ((32_768, 192, 192), (32_768, 192, 768), (32_768, 768, 192), (4096, 192, 768), (4096, 1024, 1024))
"""Tokens, channels in and out."""


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--threads", type=whole_number, default=1)
    parser.add_argument("--repetitions", type=whole_number, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    keep_for_the_next_layer(torch.device("cpu"))
    with torch.inference_mode():
        rows = [linear(*sizes, gelu, options.repetitions) for sizes, gelu in product(LINEAR, (False, True))]
        rows += [attention(*case, dim, options.repetitions) for case, dim in product(ATTENTION, (32, 64, 128))]
    shown = Table("what", "torch, ms", "oneDNN, ms", "times as fast", "oneDNN is taken")
    for row in rows:
        times = row["torch_s"], row["onednn_s"]
        shown.add_row(row["what"], *(f"{1e3 * s:.2f}" for s in times), f"{times[0] / times[1]:.2f}", str(row["taken"]))
    Console().print(shown)
    save({"machine": machine(torch.device("cpu")), "threads": options.threads, "rows": rows}, options.json)


def linear(tokens: int, inputs: int, outputs: int, gelu: bool, repetitions: int) -> dict[str, Any]:
    layer, x = nn.Linear(inputs, outputs), torch.randn(tokens, inputs)
    activation = nn.GELU(approximate="tanh") if gelu else nn.Identity()
    stock, ours = in_turns(lambda: activation(layer(x)), lambda: activation(on_cpu.product(layer, x)), repetitions)
    what = f"{tokens} tokens, {inputs} to {outputs} channels{', GELU' * gelu}"
    return {"what": what, "torch_s": stock, "onednn_s": ours, "taken": on_cpu.takes(layer, x)}


def attention(
    name: str, batch: int, queries: int, keys: int, masked: bool, head_dim: int, repetitions: int
) -> dict[str, Any]:
    query, key, value = (torch.randn(batch, count, HEADS, head_dim).transpose(1, 2) for count in (queries, keys, keys))
    hidden = torch.rand(queries, keys) > 0.5
    bias = torch.zeros(queries, keys).masked_fill_(hidden, -torch.inf) if masked else None
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    calls = partial(kernel, query, key, value, attn_mask=bias), partial(onednn.attend, query, key, value, None, bias)
    stock, ours = in_turns(*calls, repetitions)
    what = f"{name}: {batch * HEADS} x {queries} queries, {keys} keys, heads of {head_dim}"
    return {"what": what, "torch_s": stock, "onednn_s": ours, "taken": onednn.takes(query, key)}


def in_turns(first: Callable[[], Any], second: Callable[[], Any], repetitions: int) -> list[float]:
    """Median CPU seconds of each call, after a first one."""
    calls = first, second
    for call in calls:
        call()
    rounds = [[cpu_seconds(call) for call in calls] for _ in range(repetitions)]
    return [median(times) for times in zip(*rounds, strict=True)]


def cpu_seconds(call: Callable[[], Any]) -> float:
    start = process_time()
    call()
    return process_time() - start


if __name__ == "__main__":
    main()
