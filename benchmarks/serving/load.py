"""Mixed requests at a server that runs here: good ones, wrong ones, clients that leave or read slowly.

    clear-dist serve --model demo --device cpu --nproc 2 --port 8000 &
    python -m benchmarks.serving.load --pid $! --requests 200 --at-once 16 --output load.json

Each good answer is compared with the first one to the same request; memory is that of all the server's processes.
"""

import argparse
import hashlib
import json
import random
import socket
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median, quantiles
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

import httpx2

SEEDS = 4
"""Different good requests, so that each is asked for many times."""
PATH = "/v1/images/generations"
SECONDS = 600.0
AFTER = 10
"""Requests after which memory is looked at first."""


class Load:
    def __init__(self, url: str, pid: int | None) -> None:
        self._url, self._pid = url, pid
        self._client = httpx2.Client(base_url=url, timeout=SECONDS)
        self._first: dict[int, str] = {}
        self._lock = Lock()
        self.outcomes: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.memory: list[int] = []

    def good(self, seed: int) -> str:
        began = time.perf_counter()
        answer = self._client.post(PATH, json=body(seed))
        if answer.status_code == 429:
            return "told to come back"
        answer.raise_for_status()
        self.seconds.append(time.perf_counter() - began)
        found = hashlib.sha256(answer.json()["data"][0]["b64_json"].encode()).hexdigest()
        with self._lock:
            is_right = self._first.setdefault(seed, found) == found
        return "good" if is_right else "WRONG PICTURE"

    def wrong(self, seed: int) -> str:
        wrong = random.Random(seed).choice(({"size": "17x17"}, {"steps": 0}, {"n": 99}, {"nothing": 1}, {"prompt": ""}))
        status = self._client.post(PATH, json=body(seed) | wrong).status_code
        return "refused" if status == 400 else f"WRONG STATUS {status}"

    def cancelled(self, seed: int) -> str:
        answer = self._client.post(f"{PATH}?async=true", json=body(seed))
        if answer.status_code == 429:
            return "told to come back"
        job = answer.json()["id"]
        status = self._client.delete(f"/v1/jobs/{job}").status_code
        return "cancelled" if status in (200, 202) else f"WRONG STATUS {status}"

    def leaving(self, seed: int) -> str:
        with self._connected(seed):
            time.sleep(0.2)
        return "left"

    def slow(self, seed: int) -> str:
        with self._connected(seed) as client:
            taken = 0
            while piece := client.recv(4_096):
                taken += len(piece)
                time.sleep(0.005)
        return "read slowly" if taken else "NOTHING READ"

    def ask(self, number: int) -> None:
        kinds: tuple[Callable[[int], str], ...] = (self.good,) * 6 + (
            self.wrong,
            self.cancelled,
            self.leaving,
            self.slow,
        )
        try:
            outcome = kinds[number % len(kinds)](number % SEEDS)
        except (httpx2.HTTPError, OSError) as error:
            outcome = f"FAILED {type(error).__name__}"
        with self._lock:
            self.outcomes[outcome] += 1
            if sum(self.outcomes.values()) == AFTER:
                self.look()

    def look(self) -> None:
        """Note what the server's processes hold of memory."""
        if self._pid is not None:
            self.memory.append(sum(map(resident, family_of(self._pid))))

    def _connected(self, seed: int) -> socket.socket:
        content, address = json.dumps(body(seed)).encode(), urlsplit(self._url)
        assert address.hostname is not None
        client = socket.create_connection((address.hostname, address.port or 80), timeout=SECONDS)
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        return client


def body(seed: int) -> dict[str, Any]:
    return {"prompt": "sunset over green mountains, clear sky", "size": "128x128", "steps": 2, "seed": seed}


def family_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(each for child in children for each in family_of(int(child)))]


def resident(pid: int) -> int:
    """Bytes of a process's own, and its share of what it shares."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--pid", type=int, help="the server's, for its memory")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--output", type=Path, help="JSON")
    given = parser.parse_args()
    load = Load(given.url, given.pid)
    began = time.perf_counter()
    with ThreadPoolExecutor(given.at_once) as pool:
        list(pool.map(load.ask, range(given.requests)))
    load.look()
    alone = [load.seconds.pop() for _ in range(8) if load.good(0) == "good"]
    figures = {
        "outcomes": dict(load.outcomes),
        "seconds": time.perf_counter() - began,
        "p50": median(load.seconds),
        "p95": quantiles(load.seconds, n=20)[-1],
        "alone_p50": median(alone),
        "memory_bytes": load.memory,
    }
    print(json.dumps(figures, indent=2))
    if given.output is not None:
        given.output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
