"""`run_ranks(function, size)`: run a function on several ranks, each a process of its own, and return their results."""

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from clear_dist.comm.group import Group, PeerLost
from clear_dist.commands import draw, verify
from clear_dist.launch.ranks import QUIET
from tests.patience import PATIENCE

# Imported once, in the server that ranks are forked from, and all that these import: seconds, in each rank.
PRELOADED = [
    "pytest",
    "hypothesis",
    "tests.oracle",
    "tests.tiny",
    "tests.ranks",
    *draw.PRELOAD,
    *verify.PRELOAD,
    "tests.frozen",
]
SECONDS_AFTER_A_FAILURE = 10.0 * PATIENCE


class RanksFailedError(AssertionError):
    """At least one rank raised, died or hung; `failures` holds the traceback, or what happened, of each that did."""

    def __init__(self, failures: dict[int, str]) -> None:
        self.failures = failures
        # Errors that follow from a lost peer come last.
        causes_first = sorted(failures.items(), key=lambda item: ("PeerLost" in item[1], item[0]))
        super().__init__("\n".join(f"rank {rank}: {text}" for rank, text in causes_first))


@dataclass
class _Rank:
    process: BaseProcess
    inbox: Connection
    result: Any = None
    failure: str | None = None


def run_ranks(function: Callable[..., Any], size: int, *args: Any, timeout: float = 120, **kwargs: Any) -> list[Any]:
    """Call `function(group, *args, **kwargs)` on `size` ranks (gloo, CPU, one thread each).

    Args:
        function: importable, that is at the top level of a module; arguments and results are pickled, tensors too.
        timeout: seconds after which all ranks are killed, times PATIENCE.

    Returns:
        What each rank returned, in order.

    Raises:
        RanksFailedError: a rank raised, died or hung. The others are given a few seconds to notice, then killed.
    """
    timeout *= PATIENCE
    call = pickle.dumps((function, args, kwargs))
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [_start(rank, size, store.port, timeout, call) for rank in range(size)]
    try:
        _collect(ranks, time.monotonic() + timeout)
    finally:
        for rank in ranks:
            rank.process.kill()
            rank.process.join()
            rank.inbox.close()
    failures = {number: rank.failure for number, rank in enumerate(ranks) if rank.failure is not None}
    if failures:
        raise RanksFailedError(failures)
    return [rank.result for rank in ranks]


def server() -> ForkServerContext:
    """What forks processes from one that has imported PRELOADED, its libraries as quiet as the product's ranks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with patch.dict(os.environ, QUIET):
        forkserver.ensure_running()
    return context


def _start(rank: int, size: int, port: int, timeout: float, call: bytes) -> _Rank:
    context = server()
    inbox, outbox = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(rank, size, port, timeout, call, outbox), daemon=True)
    process.start()
    outbox.close()  # the child's copy is the only one left: its death ends the pipe
    return _Rank(process, inbox)


def _collect(ranks: list[_Rank], deadline: float) -> None:
    """Receive every rank's result, or its failure; after the first failure the others have little time left."""
    awaited = list(ranks)
    while awaited:
        ready = wait([rank.inbox for rank in awaited], timeout=max(0.0, deadline - time.monotonic()))
        for rank in awaited:
            if rank.inbox in ready:
                _receive(rank)
            elif not ready:
                rank.failure = "hung, or waited for a rank that did, and was killed"
            if rank.failure is not None:
                deadline = min(deadline, time.monotonic() + SECONDS_AFTER_A_FAILURE)
        awaited = [rank for rank in awaited if ready and rank.inbox not in ready]


def _receive(rank: _Rank) -> None:
    try:
        rank.result, rank.failure = pickle.loads(rank.inbox.recv_bytes())
    except EOFError:
        rank.process.join(SECONDS_AFTER_A_FAILURE)
        rank.failure = f"died with exit code {rank.process.exitcode} and told nothing"


def _run(rank: int, size: int, port: int, timeout: float, call: bytes, outbox: Connection) -> None:
    """The life of one rank."""
    torch.set_num_threads(1)
    try:
        store = dist.TCPStore("127.0.0.1", port)
        dist.init_process_group("gloo", store=dist.PrefixStore("ranks", store), rank=rank, world_size=size)
        function, args, kwargs = pickle.loads(call)
        group = Group.create("cpu", timeout_seconds=timeout)
        outbox.send_bytes(pickle.dumps((function(group, *args, **kwargs), None)))
    except BaseException:
        outbox.send_bytes(pickle.dumps((None, traceback.format_exc())))
        # No farewell: its connections end at once, which is how the other ranks learn of it.
        os._exit(1)
    with suppress(PeerLost):
        # A rank that ends sooner would take away messages that others still wait for.
        group.barrier()
    os._exit(0)
