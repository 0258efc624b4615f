"""What is made of NCCL's failures: texts of torch and NCCL as users reported them, and what becomes of each."""

from multiprocessing import Pipe

import pytest
import torch
import torch.distributed as dist

from clear_dist.comm.group import PeerLost, _telling_failed_connections, telling_lost_peers
from clear_dist.comm.nccl import NcclError
from clear_dist.launch import ends, env

WHERE = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3699, "
CLASSES = {
    "cuda": "unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.3\n"
    "ncclUnhandledCudaError: Call to CUDA function failed.",
    "system": "unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.21.5\n"
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error. ",
    "internal": "internal error - please report this issue to the NCCL developers, NCCL version 2.21.5\n"
    "ncclInternalError: Internal check failed.",
    "usage": "invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.20.5\n"
    "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.",
    "remote": "remote process exited or there was a network error, NCCL version 2.18.6\n"
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
}
FRAMES = (
    "\nException raised from create at /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268 (most recent call first):"
    "\nframe #0: c10::Error::Error(c10::SourceLocation, std::string) (0x7f: Connection refused)"
)
OWN = [
    ("system", "Error while creating shared memory segment /dev/shm/nccl-1YsMbG (size 7340384)", "--shm-size"),
    ("system", "Error: failed to extend /dev/shm/nccl-WU88OE to 9637892 bytes, error: No space left on device (28)", "NCCL_SHM_DISABLE=1"),
    ("internal", "Bootstrap : no socket interface found", "NCCL_SOCKET_IFNAME"),
    ("internal", "ncclSocketInit: connecting to address with family 59936 is neither AF_INET(2) nor AF_INET6(10)", "NCCL_SOCKET_IFNAME"),
    ("cuda", "Cuda failure 2 'out of memory'", "clear-dist plan"),
    ("cuda", "Failed to CUDA calloc 6291456 bytes", "clear-dist plan"),
    ("cuda", "Cuda failure 217 'peer access is not supported between these two devices'", "NCCL_P2P_DISABLE=1"),
    ("system", "Call to ibv_create_cq failed with error Cannot allocate memory", "memlock"),
    ("system", "Call to ibv_reg_mr_iova2 failed with error Cannot allocate memory", "NCCL_IB_DISABLE=1"),
    ("usage", "Mismatched NCCL version detected : rank 1 version 22705 rank 0 version 22703", "the same torch"),
    ("internal", "Message truncated : received 256 bytes instead of 4", "the same torch"),
    ("usage", "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 10", "a GPU of its own"),
    ("cuda", "Cuda failure 1 'invalid argument'", "NCCL_DEBUG=WARN"),
    ("usage", "Invalid config blocking attribute value -2147483648", "NCCL_DEBUG=WARN"),
    ("internal", "Proxy Call to rank 1 failed (Connect)", "NCCL_DEBUG=WARN"),
]  # fmt: skip
LOST = [
    ("remote", "socketProgress: Connection closed by remote peer node2<42830>", "NCCL_DEBUG=WARN"),
    ("internal", "socketProgress: Connection closed by remote peer ng30903-ib.narval.calcul.quebec<51159>", "NCCL_DEBUG=WARN"),
    ("internal", "Socket recv failed while polling for opId=0x55a51966cc80", "NCCL_DEBUG=WARN"),
    ("remote", "NET/IB : Got completion from peer 11.214.147.122<39138> with error 12, opcode 0, len 0, vendor err 129", "NCCL_IB_DISABLE=1"),
    ("system", "socketStartConnect: Connect to 192.168.19.14<52822> failed : No route to host", "NCCL_SOCKET_IFNAME"),
    ("system", "socketPollConnect: Connect to 10.0.0.4<56849> returned 113(No route to host) errno 115(Operation now in progress)", "NCCL_SOCKET_IFNAME"),
]  # fmt: skip
ABORTED = "NCCL communicator was aborted on rank 3.  Original reason for failure was: "
TIMED_OUT = "[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=266392, OpType=ALLGATHER, Timeout(ms)=1800000) ran for 1803169 milliseconds before timing out."  # fmt: skip
NO_ID = "[4] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-value store by key '0', but store->get('0') got error: Socket Timeout"  # fmt: skip


def raised(error: Exception) -> RuntimeError:
    with pytest.raises(RuntimeError) as caught, telling_lost_peers("rank 1"):
        raise error
    return caught.value


@pytest.mark.parametrize("frames", ["", FRAMES])
@pytest.mark.parametrize(("kind", "said", "advice"), OWN)
def test_a_fault_of_this_rank_is_told_with_its_cause(kind: str, said: str, advice: str, frames: str) -> None:
    error = raised(dist.DistBackendError(f"{WHERE}{CLASSES[kind]}\nLast error:\n{said}{frames}"))
    assert type(error) is NcclError
    cause, _, rest = str(error).partition("; ")
    assert (cause, advice in rest, "\n" in rest) == (said, True, False)


@pytest.mark.parametrize(("kind", "said", "advice"), LOST)
def test_a_peer_that_is_gone_is_lost(kind: str, said: str, advice: str) -> None:
    error = raised(dist.DistBackendError(f"{WHERE}{CLASSES[kind]}\nLast error:\n{said}{FRAMES}"))
    assert type(error) is PeerLost
    cause, _, rest = str(error).partition("; ")
    assert (cause, advice in rest) == (f"rank 1 is gone: {said}", True)


@pytest.mark.parametrize("text", [ABORTED + TIMED_OUT, NO_ID])
def test_ranks_that_do_not_answer_are_lost(text: str) -> None:
    assert str(raised(dist.DistBackendError(text))).startswith(f"rank 1 is gone: {' '.join(text.split())}; ")


def test_a_communicator_aborted_for_a_fault_of_this_rank_tells_it() -> None:
    error = raised(
        dist.DistBackendError(f"{ABORTED}{WHERE}{CLASSES['cuda']}\nLast error:\nCuda failure 2 'out of memory'")
    )
    assert str(error).startswith("Cuda failure 2 'out of memory'; ")
    assert type(error) is NcclError


def test_an_error_that_says_nothing_keeps_its_class() -> None:
    error = raised(dist.DistBackendError(f"{WHERE}{CLASSES['cuda']}"))
    assert str(error).startswith(
        "unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.3 ncclU"
    )


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: the launch timed out and was terminated"),
        RuntimeError(
            "[enforce fail at /gloo/transport/tcp/socket.cc:28] rv != -1. -1 vs -1. socket: Too many open files"
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        NcclError("told already; timed out"),
    ],
)
def test_other_errors_stay_as_they_are(error: RuntimeError) -> None:
    assert raised(error) is error


def test_ranks_that_cannot_connect_are_a_cause_to_tell_of(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "socketStartConnect: Connect to 192.168.19.14<52822> failed : No route to host"

    def connect() -> None:
        with _telling_failed_connections():
            raise dist.DistBackendError(f"{WHERE}{CLASSES['system']}\nLast error:\n{said}")

    for name, value in env.variables(rank=1, size=2, port=1, threads=1).items():
        monkeypatch.setenv(name, value)
    inbox, outbox = Pipe(duplex=False)
    assert ends.run_rank(connect, traceback=False, outbox=outbox) == 1
    cause = inbox.recv()
    assert cause.line.startswith(
        f"rank 1 failed: ConnectionError: cannot connect to the other ranks: {said}; NCCL_SOCKET"
    )
    assert not cause.lost
