"""A program: captures of torch on null GPUs; prints, as JSON, what they count and how those that must fail do."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clear_dist.engine.capture import as_cuda_graph
from tests.cuda.null_gpu import Counts


class Captures:
    """One tensor, a stream beside the capturing one, and the stubs' counts."""

    def __init__(self) -> None:
        self.x = torch.zeros(64, 64, device="cuda")
        self.beside = torch.cuda.Stream()
        self.counts = Counts()
        self.x @ self.x  # cuBLAS has its workspace

    def replayed(self, work: Callable[[Tensor], Any]) -> dict[str, int]:
        """Counts of two launches of the graph of `work`, those that are not 0."""
        replay, _ = as_cuda_graph(partial(work, self.x))
        self.counts.since_last()
        replay()
        replay()
        return {name: count for name, count in self.counts.since_last().items() if count}

    def failure(self, work: Callable[[Tensor], Any]) -> str:
        """First line of the error of a capture; what comes after it must succeed."""
        try:
            as_cuda_graph(partial(work, self.x))
        except RuntimeError as error:
            (torch.ones(1 << 20, device="cuda") + 1).sum().item()
            return str(error.__context__ or error).partition("\n")[0]  # to end an invalid capture fails, too
        return ""

    def fork(self, x: Tensor, *, joined: bool) -> None:
        self.beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.beside):
            x.add_(1)
        if joined:
            torch.cuda.current_stream().wait_stream(self.beside)
        x.add_(1)

    def uncaptured(self, x: Tensor) -> None:
        before = torch.cuda.Event()
        with torch.cuda.stream(torch.cuda.Stream()):
            before.record()
        torch.cuda.current_stream().wait_event(before)

    def asked(self, x: Tensor) -> None:
        event = torch.cuda.Event()
        event.record()
        event.query()


def main() -> None:
    here = Captures()
    before = here.counts.since_last()
    here.x.add_(1)
    eager = {name: count for name, count in here.counts.since_last().items() if count}
    assert before["launches"]
    found = {
        "eager": eager,
        "kernels": here.replayed(lambda x: x.add_(1).mul_(2).sub_(3)),
        "product": here.replayed(lambda x: x @ x),
        "copy": here.replayed(lambda x: torch.empty_like(x).copy_(x)),
        "joined": here.replayed(lambda x: here.fork(x, joined=True)),
        "unjoined": here.failure(lambda x: here.fork(x, joined=False)),
        "stream": here.failure(lambda x: torch.cuda.current_stream().synchronize()),
        "device": here.failure(lambda x: torch.cuda.synchronize()),
        "to the host": here.failure(lambda x: x.cpu()),
        "pageable": here.failure(lambda x: torch.zeros(8).cuda()),
        "event": here.failure(here.asked),
        "outside": here.failure(here.uncaptured),
        "again": here.replayed(lambda x: x.add_(1)),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
