"""Ranks in network namespaces, joined by links of a given bandwidth and latency. Linux; no root needed.

Each rank's packets leave through a TUN device that this relay reads: packets leave one after the other, each in its
size / bandwidth, and arrive one latency later. TCP above is the kernel's own. (`tc netem` does the same, but many
kernels lack it.)

    status = run([sys.executable, "-m", "program"], ranks=2)      starts the program on two ranks
    link = join(); link.set(bandwidth=25e6, latency=1e-3)         in the program, before torch is used
"""

import fcntl
import heapq
import math
import os
import select
import socket
import struct
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

DEVICE, MTU = "slow0", 16_000
ADDRESS = "10.77.0.{}"
NAMESPACE = ("unshare", "--user", "--map-root-user", "--net")
_SOCKET, _PORT = "CLEAR_DIST_LINK_SOCKET", "29400"
_SETTING = struct.Struct("dd")
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


class Link:
    """A rank's end of the network."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control

    def set(self, *, bandwidth: float, latency: float) -> None:
        """Set the links of all ranks; one rank calls this while nothing is being sent.

        Args:
            bandwidth: bytes per second of each rank in each direction; may be infinite.
            latency: seconds one way.
        """
        self._control.send(_SETTING.pack(bandwidth, latency))
        self._control.recv(1)


def join() -> Link:
    """Connect this process, started by `run`, to the others; call it once."""
    rank, control = int(os.environ["RANK"]), socket.socket(fileno=int(os.environ[_SOCKET]))
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
    for command in (
        f"link set dev {DEVICE} mtu {MTU} txqueuelen 10000 up",
        f"addr add {ADDRESS.format(rank + 1)}/24 dev {DEVICE}",
        "link set lo up",
    ):
        subprocess.run(["ip", *command.split()], check=True)
    os.environ["GLOO_SOCKET_IFNAME"] = DEVICE
    socket.send_fds(control, [b"."], [device])
    control.recv(1)
    return Link(control)


def run(command: Sequence[str], *, ranks: int) -> int:
    """Start `command` on each rank, with torchrun's variables, and relay packets until all have ended.

    Returns:
        0, or the exit status of a rank that failed, after which the others are ended.
    """
    meeting = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": ADDRESS.format(1), "MASTER_PORT": _PORT}
    controls, processes = [], []
    for rank in range(ranks):
        mine, theirs = socket.socketpair()
        variables = {"RANK": str(rank), _SOCKET: str(theirs.fileno())}
        environment = os.environ | meeting | variables
        processes.append(subprocess.Popen([*NAMESPACE, *command], env=environment, pass_fds=(theirs.fileno(),)))
        theirs.close()
        controls.append(mine)
    try:
        relay = _Relay([_device_of(control) for control in controls])
        running = dict(zip(controls, processes, strict=True))
        while running:
            ended = running.pop(relay.run_until_one_ends(list(running)))
            if ended.wait():
                break  # packets of the others to it would travel for ever
        return max(abs(process.poll() or 0) for process in processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _device_of(control: socket.socket) -> int:
    told, devices, _, _ = socket.recv_fds(control, 1, 1)
    if not told:
        raise SystemExit("a rank ended before it had joined the network")
    os.set_blocking(devices[0], False)
    control.send(told)
    return devices[0]


@dataclass
class _Relay:
    devices: list[int]
    bandwidth: float = math.inf
    latency: float = 0.0
    _free_at: dict[int, float] = field(default_factory=dict)
    """Time at which each rank's link is idle again."""
    _travelling: list[tuple[float, int, bytes]] = field(default_factory=list)
    """Heap of arrival time, receiver's device and packet."""

    def run_until_one_ends(self, controls: list[socket.socket]) -> socket.socket:
        """Relay packets and apply settings; returns the control socket of the rank that has ended."""
        while True:
            timeout = max(0.0, self._travelling[0][0] - time.monotonic()) if self._travelling else None
            ready, _, _ = select.select([*self.devices, *controls], [], [], timeout)
            for source in ready:
                if isinstance(source, int):
                    self._take(source)
                elif not self._obey(source):
                    return source
            self._deliver()

    def _take(self, device: int) -> None:
        try:
            while True:
                packet = os.read(device, MTU)
                receiver = packet[19] - 1  # the last byte of an IPv4 packet's destination
                if packet[0] >> 4 != 4 or not 0 <= receiver < len(self.devices):
                    continue  # the kernel's own announcements
                leaves = max(time.monotonic(), self._free_at.get(device, 0.0)) + len(packet) / self.bandwidth
                self._free_at[device] = leaves
                heapq.heappush(self._travelling, (leaves + self.latency, self.devices[receiver], packet))
        except BlockingIOError:
            return

    def _obey(self, control: socket.socket) -> bool:
        """Apply a rank's setting; False if the rank has ended."""
        setting = control.recv(_SETTING.size)
        if setting:
            self.bandwidth, self.latency = _SETTING.unpack(setting)
            control.send(b".")
        return bool(setting)

    def _deliver(self) -> None:
        now = time.monotonic()
        while self._travelling and self._travelling[0][0] <= now:
            _, device, packet = heapq.heappop(self._travelling)
            os.write(device, packet)
