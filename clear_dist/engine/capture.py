"""Capture of a function's launches as a CUDA graph, which the GPU is then given at once."""

from collections.abc import Callable
from typing import Any

import torch

Capture = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]
"""Records what a function launches, and runs none of it; returns what replays it, and the output that replays write to.

Raises RuntimeError where something in the function cannot be recorded.
"""


def as_cuda_graph(work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """`work` on the current device; what it allocates is the graph's, and stays in place as long as that lives."""
    graph = torch.cuda.CUDAGraph()
    # The stream is put back also after a failure, which torch does not do. Thread-local: others may ask for events.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = work()
    return graph.replay, output
