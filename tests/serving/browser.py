"""A headless Chromium, told what to do by its DevTools protocol over two pipes."""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.patience import PATIENCE

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe")
SECONDS = 120 * PATIENCE


class Page:
    def __init__(self, sent: int, heard: int) -> None:
        self._sent, self._heard = os.fdopen(sent, "wb", buffering=0), os.fdopen(heard, "rb", buffering=0)
        self._number, self._rest, self._session = 0, b"", {}
        self.requested: list[str] = []
        """Addresses that the page has asked."""
        target = self.tell("Target.createTarget", url="about:blank")["targetId"]
        session = self.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Network"):
            self.tell(f"{domain}.enable")

    def tell(self, method: str, **params: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params} | self._session
        self._sent.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("method") == "Network.requestWillBeSent":
                self.requested.append(answer["params"]["request"]["url"])
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, url: str) -> None:
        self.tell("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        """The value of a script."""
        found = self.tell("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, script: str) -> None:
        """Wait until a script's value is true."""
        deadline = time.monotonic() + SECONDS
        while not self.run(script):
            assert time.monotonic() < deadline, (script, self.run("document.body.innerText"))
            time.sleep(0.1)

    def picture(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.tell("Page.captureScreenshot")["data"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = self._heard.read(65_536)
            assert piece, "the browser has ended"
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


@contextmanager
def browsing(folder: Path) -> Iterator[Page]:
    """A page of a browser whose profile is in `folder`."""
    assert CHROMIUM is not None
    (from_us, to_it), (from_it, to_us) = os.pipe(), os.pipe()
    moved = f'exec "$@" 3<&{from_us} 4>&{to_us}'
    command = ["bash", "-c", moved, "bash", CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "--window-size=1200,800"]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, pass_fds=(from_us, to_us), **quiet)
    os.close(from_us)
    os.close(to_us)
    try:
        yield Page(to_it, from_it)
    finally:
        process.kill()
        process.wait()
