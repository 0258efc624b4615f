"""What NCCL's failures mean, read from the texts of torch's errors."""

import re
from dataclasses import dataclass

from clear_dist.launch.ends import LESS_MEMORY

_OWN = {
    "/dev/shm": "/dev/shm is too small or closed: docker run --ipc=host (or --shm-size 8g), or NCCL_SHM_DISABLE=1",
    "no socket interface found|is neither AF_INET": "NCCL_SOCKET_IFNAME must name a network interface of this machine "
    "(ip addr), or not be set",
    "ibv_.* failed": "InfiniBand fails: ulimit -l unlimited (docker run --ulimit memlock=-1), or NCCL_IB_DISABLE=1",
    "out of memory|failed to CUDA [cm]alloc": f"no memory of the GPU is left for NCCL: {LESS_MEMORY}",
    "peer access|IPC handle": "the GPUs do not reach each other's memory: NCCL_P2P_DISABLE=1",
    "mismatched NCCL version|version mismatch|truncated": "all ranks must have the same torch and NCCL, and the same "
    "variables of NCCL",
    "duplicate GPU": "each rank must have a GPU of its own",
}
"""What NCCL says last where the fault is this rank's, whatever class it gives the error; advice."""
_LOST = {
    "connect to .*(failed|returned)|no route to host|connection refused": "NCCL_SOCKET_IFNAME names the interface by "
    "which the machines reach each other (ip addr)",
    "NET/IB.*from peer": "where no rank ended before, InfiniBand fails: NCCL_IB_DISABLE=1",
    "ncclRemoteError|closed by remote peer|socket recv failed|communicator was aborted|ncclUniqueId": "",
}
"""What the text says anywhere where another rank went away, or cannot be reached; advice."""
_MORE = "NCCL_DEBUG=WARN shows what failed first"


class NcclError(RuntimeError):
    """NCCL failed on this rank, and no other rank is to blame."""


@dataclass(frozen=True)
class Failure:
    line: str
    """What NCCL said last, and advice."""
    lost: bool
    """Whether another rank went away or does not answer."""


def failure(error: BaseException | None) -> Failure | None:
    """What an error of torch tells of NCCL, if it does."""
    text = str(error).partition("Exception raised from")[0]  # frames of C++ follow
    if not re.search("NCCL (error|communicator)", text):
        return None
    last = text.partition("Last error:")[2].strip() or re.sub(r"NCCL error in: \S+ ", "", text)
    for signs, where, lost in ((_OWN, last, False), (_LOST, text, True)):
        for sign, advice in signs.items():
            if re.search(sign, where, re.IGNORECASE):
                return Failure(_line(last, advice or _MORE), lost)
    return Failure(_line(last, _MORE), lost=False)


def _line(said: str, advice: str) -> str:
    return f"{' '.join(said.split())}; {advice}"
