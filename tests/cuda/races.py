"""Races in a log of `race_log.py`: two accesses to one memory from different streams, one of them a write, unordered.

Vector clocks over streams: an event carries what its stream had seen, and a stream that waits for it has seen that too.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

PAGE = 512
"""Bytes whose accesses are looked through together."""
Seen = dict[int, int]
"""Number of the last operation that is over, by stream."""

OPERATION = re.compile(r"# op (\S+) stream (\d+) R (\S*) W ?(\S*)")
MESSAGE = re.compile(r"nccl (\w+) comm \S+ stream (\S+) peer \S+ R (\S+) (\d+) W (\S+) (\d+)")
RECORD = re.compile(r"record event (\S+) stream (\S+)")
WAIT = re.compile(r"wait stream (\S+) event (\S+)")


@dataclass(frozen=True)
class Access:
    first: int
    end: int
    stream: int
    number: int
    writes: bool
    by: str

    def clashes(self, other: "Access") -> bool:
        overlap = self.first < other.end and other.first < self.end
        return overlap and self.stream != other.stream and (self.writes or other.writes)


@dataclass
class Checker:
    races: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How often, by what came first and what came second."""
    operations: Counter[int] = field(default_factory=Counter)
    """Number of them, by stream."""
    _clocks: defaultdict[int, Seen] = field(default_factory=lambda: defaultdict(dict))
    _events: dict[str, Seen] = field(default_factory=dict)
    _host: Seen = field(default_factory=dict)
    _pages: defaultdict[int, list[Access]] = field(default_factory=lambda: defaultdict(list))

    def read(self, line: str) -> None:
        if found := OPERATION.match(line):
            name, stream, reads, writes = found.groups()
            self._operation(name, int(stream), _spots(reads), _spots(writes))
        elif found := MESSAGE.match(line):
            name, stream, sent, sent_bytes, received, received_bytes = found.groups()
            reads = [(_number(sent), int(sent_bytes))] if int(sent_bytes) else []
            writes = [(_number(received), int(received_bytes))] if int(received_bytes) else []
            self._operation(f"nccl {name}", _number(stream), reads, writes)
        elif found := RECORD.match(line):
            self._events[found[1]] = dict(self._clocks[_number(found[2])])
        elif found := WAIT.match(line):
            _learn(self._clocks[_number(found[1])], self._events.get(found[2], {}))
        elif line.startswith("streamsync"):
            _learn(self._host, self._clocks[_number(line.split()[1])])
        elif line.startswith("eventsync"):
            _learn(self._host, self._events.get(line.split()[1], {}))
        elif line.startswith("devsync"):
            for clock in list(self._clocks.values()):
                _learn(self._host, clock)

    def has_waited(self, stream: int, other: int) -> bool:
        """Whether `stream` has waited for all that `other` was given so far."""
        return self._clocks[stream].get(other, 0) == self.operations[other]

    def _operation(
        self, name: str, stream: int, reads: Iterable[tuple[int, int]], writes: Iterable[tuple[int, int]]
    ) -> None:
        clock = self._clocks[stream]
        _learn(clock, self._host)
        clock[stream] = clock.get(stream, 0) + 1
        self.operations[stream] += 1
        for spots, is_write in ((reads, False), (writes, True)):
            for first, size in spots:
                self._access(Access(first, first + size, stream, clock[stream], is_write, name))

    def _access(self, access: Access) -> None:
        clock = self._clocks[access.stream]
        for page in range(access.first // PAGE, -(-access.end // PAGE)):
            kept = []
            for before in self._pages[page]:
                is_over = before.stream == access.stream or clock.get(before.stream, 0) >= before.number
                if before.clashes(access) and not is_over:
                    self.races[before.by, access.by] += 1
                is_covered = access.first <= before.first and before.end <= access.end
                if not (access.writes and is_over and is_covered):
                    kept.append(before)
            self._pages[page] = [*kept[-63:], access]


def check(lines: Iterable[str]) -> Checker:
    checker = Checker()
    for line in lines:
        checker.read(line)
    return checker


def _learn(clock: Seen, other: Seen) -> None:
    for stream, number in other.items():
        clock[stream] = max(clock.get(stream, 0), number)


def _spots(text: str) -> list[tuple[int, int]]:
    pairs = (spot.split(",") for spot in text.split(";") if spot)
    return [(int(first), int(size)) for first, size in pairs]


def _number(address: str) -> int:
    return 0 if address == "(nil)" else int(address, 16)
