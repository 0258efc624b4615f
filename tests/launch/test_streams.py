"""Nothing that only tells ends work: streams that are closed, full, broken, or of few letters."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import os, sys, warnings
from types import SimpleNamespace
from rich.console import Console
from clear_dist import cli
from clear_dist.commands import app
from clear_dist.commands.draw import _render
from clear_dist.launch import ranks
from clear_dist.launch.ends import say


def render(request, began):
    assert os.fstat(2) and os.fstat(1), "no file that is opened gets their numbers"
    for number in range(3):
        print("output=Ёж", number, flush=True)
        say(f"Ёж {number}")
        Console(stderr=True).print("Ёж")
        warnings.warn("Ёж")
    from clear_dist.launch import env
    open(f"{env.read().rank}.done", "x").close()


sys.modules["clear_dist.commands.render"] = SimpleNamespace(render=render)


def work():
    _render(None, 0.0)


def run(arguments):
    return ranks.run(work, nproc=int(arguments[0]), on_cuda=arguments[1] == "spawn")


if __name__ == "__main__":
    app.run = run
    cli.main(sys.argv[1:])
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    return file


def run(script: Path, streams: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    command = ["bash", "-c", f'"$@" {streams}', "bash", sys.executable, str(script), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    return subprocess.run(command, capture_output=True, cwd=script.parent, env=environment)


@pytest.mark.parametrize("streams", ["2>&-", ">&- 2>&- <&-", ">/dev/full 2>/dev/full", "| true"])
@pytest.mark.parametrize("ranks", [("1", "fork"), ("2", "fork"), ("2", "spawn")])
def test_work_is_done_where_nobody_hears_of_it(script: Path, streams: str, ranks: tuple[str, str]) -> None:
    ended = run(script, streams, *ranks)
    assert ended.returncode == 0, ended.stderr
    assert b"Traceback" not in ended.stderr
    assert len([*script.parent.glob("*.done")]) == int(ranks[0])


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_letters_that_an_encoding_lacks_are_escaped(script: Path, encoding: str) -> None:
    ended = run(script, "", "1", "fork", PYTHONIOENCODING=f"{encoding}:strict")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.decode("ascii") == "".join(f"output=\\u0401\\u0436 {number}\n" for number in range(3))
    assert rb"clear-dist: \u0401\u0436 2" in ended.stderr
