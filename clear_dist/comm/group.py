"""The ranks that make one image together: their devices, and how their tensors travel."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from clear_dist.comm import nccl, process_groups
from clear_dist.comm.counters import labelled
from clear_dist.comm.process_groups import Transport
from clear_dist.options import JOIN_SECONDS

REDUCE_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
_SIGNS_OF_DEATH = ("closed by peer", "reset by peer", "broken pipe", "closed by remote peer")
_SIGNS_OF_LOSS = (*_SIGNS_OF_DEATH, "refused", "timed out", "timeout", "socket closed", "unexpectedly closed")


class PeerLost(RuntimeError):
    """Another rank went away or stopped answering; this rank's error only follows from it."""


@contextmanager
def telling_lost_peers(who: str = "another rank") -> Iterator[None]:
    """Turn the transport's errors inside into PeerLost or NcclError; goes around every post and every wait."""
    try:
        yield
    except (PeerLost, nccl.NcclError, torch.AcceleratorError):
        raise  # CUDA, too, speaks of time that is out
    except RuntimeError as error:
        failure = nccl.failure(error)
        if failure is not None and not failure.lost:
            raise nccl.NcclError(failure.line) from error
        if failure is None and not (isinstance(error, dist.DistError) or _shows(error, _SIGNS_OF_LOSS)):
            raise
        raise PeerLost(f"{who} is gone: {_in_a_line(error)}") from error


@dataclass(frozen=True, kw_only=True)
class Group:
    """Ranks of one image, numbered 0 ... size - 1 *within* the group; all call what communicates, in the same order."""

    rank: int
    ranks: tuple[int, ...]
    """Global numbers."""
    device: torch.device
    transport: Transport
    """nccl: from GPU to GPU; gloo: CPU tensors; host: gloo through (pinned) host memory."""
    asked_transport: Transport | Literal["auto"]
    timeout: timedelta
    main: dist.ProcessGroup
    text: dist.ProcessGroup
    """For text and the join, which would wait behind the halos in one NCCL group."""
    closes_torch: bool
    """Whether `close` must shut torch.distributed down: one rank, which the engine has initialised."""

    @classmethod
    def create(
        cls,
        device: torch.device | str,
        *,
        process_group: dist.ProcessGroup | None = None,
        transport: Transport | Literal["auto"] = "auto",
        timeout_seconds: float = 600.0,
        join_seconds: float = JOIN_SECONDS,
        share_gpus: bool = False,
    ) -> "Group":
        """Make the group of all ranks of `process_group`; all of them call this, others need not.

        Without one the default group is taken, which is initialised with the launcher's ranks, or alone, if need be;
        that of several ranks stays until the process ends. They may come `join_seconds` one after another. A CUDA
        device becomes the current one, as NCCL demands. "auto" is gloo on CPU, NCCL where each rank has a GPU of its
        own, host where ranks share one: with `share_gpus` also while other GPUs of their machine are idle.

        Raises ValueError (not a rank of it, a transport unfit for the device, idle GPUs), ConnectionError, PeerLost or
        NcclError.
        """
        device, timeout = process_groups.with_index(torch.device(device)), timedelta(seconds=timeout_seconds)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        process_groups.check_transport(device, transport)
        if process_group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("this process must be a rank of process_group, and is not")
        is_new = not dist.is_initialized()
        if is_new:
            process_groups.initialise_torch(device, timeout, join_seconds)
        ranks = tuple(sorted(dist.get_process_group_ranks(process_group)))
        group = cls._of([ranks], device, transport, timeout, is_new and dist.get_world_size() == 1)
        if group.asked_transport == "auto" and group.transport == "host":
            everyone = group.gather_objects(process_groups.place_of(device, may_share=share_gpus))
            try:
                process_groups.check_sharing(everyone)
            except ValueError:
                group.close()
                raise
        return group

    @classmethod
    def _of(
        cls,
        parts: Sequence[tuple[int, ...]],
        device: torch.device,
        transport: Transport | Literal["auto"],
        timeout: timedelta,
        closes_torch: bool = False,
    ) -> "Group":
        """Group of the part (global ranks, disjoint) that this process is in; the ranks of all parts call this."""
        with _telling_failed_connections():
            main = process_groups.new_process_group(parts, process_groups.backends(device), timeout)
            chosen = process_groups.choose_transport(device, main) if transport == "auto" else transport
            backend = "nccl" if chosen == "nccl" else "gloo"
            text = process_groups.new_process_group(parts, backend, timeout, urgent=True)
        rank = dist.get_rank()
        ranks = next(part for part in parts if rank in part)
        group = cls(
            rank=ranks.index(rank),
            ranks=ranks,
            device=device,
            transport=chosen,
            asked_transport=transport,
            timeout=timeout,
            main=main,
            text=text,
            closes_torch=closes_torch,
        )
        with _telling_failed_connections():  # NCCL's first call on a group must involve all its ranks; halos do not
            for process_group in (main, text):
                dist.all_reduce(torch.zeros(1, device=group.wire), group=process_group)
        return group

    def split(self, count: int) -> "Group":
        """New group of the first `count` ranks, on the others of the rest; all ranks call this. Raises as `create`."""
        assert 1 <= count <= self.size, f"the first {count} of {self.size} ranks"
        parts = [part for part in (self.ranks[:count], self.ranks[count:]) if part]
        return self._of(parts, self.device, self.asked_transport, self.timeout)

    def halves(self) -> "Group":
        """New group of this rank's half, the first ranks or the last; all ranks call this. Raises as `create`."""
        assert self.size % 2 == 0, f"half of {self.size} ranks"
        middle = self.size // 2
        return self._of([self.ranks[:middle], self.ranks[middle:]], self.device, self.asked_transport, self.timeout)

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def wire(self) -> torch.device:
        """Device on which tensors are sent and received."""
        return self.device if self.transport == "nccl" else torch.device("cpu")

    @property
    def copies_to_wire(self) -> bool:
        return self.transport == "host"

    def wire_buffer(
        self, shape: Sequence[int], dtype: torch.dtype, *, reuse: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`reuse` if it has this shape and dtype, else uninitialised memory on the wire's side (pinned for CUDA)."""
        if reuse is not None and reuse.shape == torch.Size(shape) and reuse.dtype == dtype:
            return reuse
        # A buffer made under inference_mode could not be written to in a later run without it.
        with torch.inference_mode(False):
            pinned = self.wire != self.device
            return torch.empty(tuple(shape), dtype=dtype, device=self.wire, pin_memory=pinned)

    def settle(self) -> None:
        """Make the host wait for copies between device and wire, which gloo knows nothing of."""
        if self.wire != self.device:
            torch.cuda.current_stream(self.device).synchronize()

    def all_reduce(self, tensor: torch.Tensor, op: Literal["sum", "max"]) -> torch.Tensor:
        """Sum or maximum over ranks of `tensor` (any shape, on `device`): a new tensor, equal on all ranks."""
        carried = self.wire_buffer(tensor.shape, tensor.dtype)
        carried.copy_(tensor)
        with telling_lost_peers():
            dist.all_reduce(carried, REDUCE_OPS[op], group=self.main)
        return carried.to(self.device)

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        """`value` of rank `source`, pickled, on all ranks."""
        values = [value]
        with telling_lost_peers():
            dist.broadcast_object_list(values, self.ranks[source], group=self.main, device=torch.device("cpu"))
        return values[0]

    def broadcast_tensors(
        self, tensors: Sequence[torch.Tensor | None] | None, source: int = 0
    ) -> list[torch.Tensor | None]:
        """Tensors of any shape and dtype, or None, of rank `source`, on `device` of all; others' are ignored."""
        mine = list(tensors or ())
        kinds = self.broadcast_object([None if x is None else (x.shape, x.dtype) for x in mine], source)
        received: list[torch.Tensor | None] = []
        for number, kind in enumerate(kinds):
            if kind is None:
                received.append(None)
                continue
            carried = self.wire_buffer(*kind)
            if self.rank == source:
                carried.copy_(mine[number])  # type: ignore[arg-type]  # of this kind, so not None
            with telling_lost_peers():
                # As bytes: gloo does not know every dtype.
                dist.broadcast(carried.view(-1).view(torch.uint8), self.ranks[source], group=self.main)
            received.append(carried.to(self.device))
        return received

    def gather_objects(self, value: Any) -> list[Any]:
        values = [None] * self.size
        with telling_lost_peers():
            dist.all_gather_object(values, value, group=self.main)
        return values

    @labelled("comm: agree")
    def agree(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank: a decision taken alone would leave the others waiting."""
        # A CPU tensor, also with NCCL: it goes through gloo and leaves the GPU's queue alone.
        flags = torch.tensor([int(flag)])
        with telling_lost_peers():
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.main)
        return bool(flags.item())

    def equal(self, values: Sequence[int]) -> bool:
        """Whether all ranks hold the same whole numbers, the same count on each; one answer for all."""
        return self.start_equal(values)()

    @labelled("comm: agree")
    def start_equal(self, values: Sequence[int]) -> Callable[[], bool]:
        """Start `equal`; returns a function that waits for the answer."""
        # Through gloo, as in `agree`. 62 bits of each: their negatives exist.
        mine = torch.tensor([value & (2**62 - 1) for value in values])
        extremes = torch.cat([mine, -mine])
        with telling_lost_peers():
            work = dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self.main, async_op=True)

        def finish() -> bool:
            with telling_lost_peers():
                work.wait()
            highest, lowest = extremes.chunk(2)
            return torch.equal(highest, -lowest)

        return finish

    def barrier(self) -> None:
        self.agree(False)

    def close(self) -> None:
        """Destroy this group's process groups; all its ranks call this, but none that failed: it would wait."""
        if not dist.is_initialized():
            return
        if self.size < dist.get_world_size():
            # Between two barriers: some may still connect (NCCL does so late), some are about to make the next group.
            self.barrier()
            if self.rank == 0:
                process_groups.forget_addresses(self.main, self.text)
            self.barrier()
        dist.destroy_process_group(self.text)
        dist.destroy_process_group(self.main)
        # Others may have been made since on what this one initialised.
        if self.closes_torch and len(dist.distributed_c10d._world.pg_map) == 1:
            dist.destroy_process_group()


def close(groups: list[Group], everyone: Group) -> None:
    """Close groups of ranks of `everyone`, the last one first, and empty the list."""
    while groups:
        closed = groups.pop()
        closed.close()
        if closed is not everyone:
            everyone.barrier()  # else the process that keeps all addresses might end while others look some up


@contextmanager
def _telling_failed_connections() -> Iterator[None]:
    """Turn errors while ranks connect into ConnectionError; all may have one cause, so none may be silent."""
    try:
        with telling_lost_peers():
            yield
    except PeerLost as error:
        if _shows(error.__cause__, _SIGNS_OF_DEATH):
            raise
        # Not from PeerLost, which would leave the telling to another rank.
        raise ConnectionError(f"cannot connect to the other ranks: {_in_a_line(error.__cause__)}") from error.__cause__


def _in_a_line(error: BaseException | None) -> str:
    failure = nccl.failure(error)
    return failure.line if failure is not None else str(error).partition("\n")[0]


def _shows(error: BaseException | None, signs: Sequence[str]) -> bool:
    return any(sign in str(error).lower() for sign in signs)
