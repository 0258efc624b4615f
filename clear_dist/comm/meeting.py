"""How the ranks of a launcher meet, and who says which of them are missing."""

import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from clear_dist.launch.ends import say
from clear_dist.launch.env import Place
from clear_dist.options import Refusal, nearest_word

FIRST_WORD_SECONDS, SECONDS_BETWEEN_WORDS, SECONDS_BETWEEN_LOOKS = 10.0, 60.0, 0.05
INTERFACES = "GLOO_SOCKET_IFNAME"
MOST_NAMED = 8
LONGEST_ATTEMPT = timedelta(seconds=2)
"""torch waits longer and longer between its own."""


class Patience:
    """A wait of at most `seconds`, with a word after ten seconds and every minute."""

    def __init__(self, seconds: float, world_size: int) -> None:
        self._began, self._next_word = time.monotonic(), FIRST_WORD_SECONDS
        self._seconds, self._world_size = seconds, world_size

    @property
    def until_next(self) -> timedelta:
        """Time until the next word, or the end."""
        left = min(self._next_word, self._seconds) - (time.monotonic() - self._began)
        return timedelta(seconds=max(left, 0.001))

    def lack(self, ranks: Sequence[int], *, speaks: bool) -> None:
        """Note that `ranks` are missing, and say so where it is time to; raises TimeoutError at the end."""
        waited, missing = time.monotonic() - self._began, ", ".join(map(str, ranks[:MOST_NAMED]))
        more = " and others" * (len(ranks) > MOST_NAMED)
        who = f"rank{'s' * (len(ranks) > 1)} {missing}{more} of {self._world_size}"
        if waited >= self._next_word:
            self._next_word += SECONDS_BETWEEN_WORDS
            if speaks:
                say(f"waiting for {who} since {waited:.0f} s; for at most {self._seconds:g} s (--join-timeout)")
        if waited >= self._seconds:
            raise TimeoutError(
                f"{who} did not come within {self._seconds:g} s; to wait longer: --join-timeout (Python: join_seconds)"
            )


def meet(place: Place, join_seconds: float) -> dist.Store:
    """Store that all ranks of the launcher share, once all are there, empty also where they have met before.

    Raises OSError or RuntimeError: they do not meet within `join_seconds`, or never could.
    """
    assert place.meeting is not None, "a launcher tells it"
    require_route(*place.meeting)
    patience = Patience(join_seconds, place.world_size)
    everyone = [str(rank) for rank in range(place.world_size)]
    met = _connect(place, patience)
    number = met.add(f"clear-dist/meetings of rank {place.rank}", 1)
    store = dist.PrefixStore(f"clear-dist/meeting {number}", met)
    store.set(everyone[place.rank], "")
    while not store.check(everyone):
        time.sleep(SECONDS_BETWEEN_LOOKS)
        missing = [rank for rank, key in enumerate(everyone) if not store.check([key])]
        if missing:
            patience.lack(missing, speaks=not set(range(place.rank)) - {*missing})
    return store


def _connect(place: Place, patience: Patience) -> dist.TCPStore:
    """The store at rank 0 or its launcher; while there is none, one rank of each machine speaks."""
    assert place.meeting is not None
    while True:
        try:
            return dist.TCPStore(
                *place.meeting,
                is_master=place.hosts_meeting,
                timeout=min(patience.until_next, LONGEST_ATTEMPT),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except dist.DistNetworkError:
            if place.hosts_meeting:
                raise
            patience.lack([0], speaks=place.local_rank == 0 or place.rank == 1)


def require_route(host: str, port: int) -> None:
    """Raises OSError for an unknown host, or where no interface leads to it: torch would try for minutes."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    for family, kind, _, _, address in found:
        with socket.socket(family, kind) as probe:
            try:
                return probe.connect(address)  # sends nothing
            except OSError as error:
                why = error.strerror
    raise OSError(f"no network interface that is up leads there ({why})")


def require_interfaces() -> None:
    """Raises a Refusal where gloo is told to use an interface that is not here."""
    here = [name for _, name in socket.if_nameindex()]
    for name in filter(None, os.environ.get(INTERFACES, "").split(",")):
        if name not in here:
            nearest = nearest_word(name, [*reversed(here)])
            raise Refusal(
                f"{INTERFACES} must name network interfaces of this machine, got {name!r}; nearest: {nearest}"
            )
