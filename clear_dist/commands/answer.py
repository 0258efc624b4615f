"""Work of each rank in `serve`: load, then draw whatever comes; rank 0 answers HTTP beside."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from clear_dist.comm.group import close
from clear_dist.commands.prepare import Prepared
from clear_dist.launch import env
from clear_dist.launch.ends import say
from clear_dist.launch.interrupts import unwinding
from clear_dist.observe.progress import watched
from clear_dist.plan.choice import by_size
from clear_dist.serving.api import app_of
from clear_dist.serving.desk import Desk
from clear_dist.serving.draw import Held, counting
from clear_dist.serving.jobs import Queue
from clear_dist.serving.loras import Shelf
from clear_dist.serving.server import answering, bound, url_of
from clear_dist.serving.service import Service
from clear_dist.serving.settled import Shapes, Start
from clear_dist.serving.store import Store
from clear_dist.serving.worker import work


def answer(known: dict[str, Any], began: float) -> None:
    """Serve until asked to end, which is a KeyboardInterrupt; raises a Refusal as `Prepared`."""
    start, rank = Start(**known), env.read().rank
    with ExitStack() as stack:
        service = stack.enter_context(_service(start)) if rank == 0 else None
        with watched(rank=rank, say=say) as phases, torch.inference_mode():
            prepared = Prepared(start.request, began, phases)
        held = Held(
            pipe=prepared.pipe,
            group=prepared.group,
            counters=prepared.handle.counters,
            ranks=by_size(prepared.fewer),
            shelf=Shelf(pipe=prepared.pipe, group=prepared.group, folder=start.flags.lora_dir),
        )
        next_task = None
        if service is not None:
            service.warm_up()
            count = counting(prepared.pipe)
            next_task = Desk(queue=service.queue, most_seconds=service.flags.max_seconds, count_tokens=count).next_task
        with unwinding(), torch.inference_mode():
            work(held, next_task, bool)
    prepared.handle.close()
    close(list(dict.fromkeys((prepared.everyone, prepared.group))), prepared.everyone)


@contextmanager
def _service(start: Start) -> Iterator[Service]:
    """HTTP on rank 0, from now on: while the model loads it says so."""
    flags = start.flags
    listening, queue = bound(flags.host, flags.port), Queue(flags.max_queue)
    kept = {"most_bytes": flags.keep_gb * 1e9, "most_seconds": flags.keep_hours * 3_600}
    store = Store(Path(flags.results).resolve(), **kept)
    service = Service(start=start, queue=queue, shapes=Shapes(start=start), store=store)
    with answering(app_of(service), listening):
        say(f"listening at {url_of(listening)}")
        try:
            yield service
        finally:
            service.leave()
