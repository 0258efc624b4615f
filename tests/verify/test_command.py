"""`clear-dist verify` as a user meets it: ranks, tables, reports, exit status, and ranks that die or hang."""

import io
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from clear_dist.cli import main
from clear_dist.launch import ranks
from clear_dist.verify import SECONDS_TO_ANSWER, Subjects, links
from clear_dist.verify import verify as verify_here
from clear_dist.verify.finding import Finding, Result, coloured, plain
from tests.commands.test_app import run
from tests.forked import forked
from tests.patience import PATIENCE
from tests.verify import faults

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | ranks.QUIET | {"PYTHONPATH": str(ROOT)}


def verify(*arguments: str) -> tuple[int | None, str, str]:
    """Exit status, stdout and stderr."""
    return ended(partial(verify_at_leisure, ["verify", "--device", "cpu", *arguments]))


def verify_at_leisure(arguments: list[str]) -> None:
    """In a process of its own: a busy machine leaves no size out, and may be late."""
    links.MOST_SECONDS = float("inf")
    SECONDS_TO_ANSWER["cpu"] *= PATIENCE
    main(arguments)


def ended(function: Callable[[], object]) -> tuple[int | None, str, str]:
    process = forked(function)
    written, told = process.communicate()
    return process.returncode, written, told


def verify_with(exchange: Any, nproc: int, output: str | None) -> int:
    """In a process of its own."""
    SECONDS_TO_ANSWER["cpu"] = 5.0 * PATIENCE
    return ranks.run(partial(verify_here, "cpu", output, Subjects(exchange=exchange)), nproc=nproc)


def faulty(exchange: Any, *, nproc: int = 2, output: str | None = None) -> tuple[int | None, list[str], list[str]]:
    """Exit status, lines on stdout and on stderr of a run in which something is wrong."""
    status, written, told = ended(partial(verify_with, exchange, nproc, output))
    return status, written.splitlines(), told.splitlines()


def test_three_ranks_pass_and_report(tmp_path: Path) -> None:
    file = tmp_path / "verify.json"
    status, output, errors = verify("--nproc", "3", "--json", str(file))
    assert (status, errors) == (0, "")
    *lines, last = output.splitlines()
    assert all(line.startswith("pass  ") for line in lines)
    assert last.startswith(f"all {len(lines)} checks passed in ")
    report = json.loads(file.read_text())
    assert (report["schema"], report["passed"], report["world_size"], report["transport"]) == (1, True, 3, "gloo")
    checks = {check["name"]: check for check in report["checks"]}
    assert len(checks) == len(lines)
    assert checks["environment"]["ranks"][2]["versions"]["torch"] == report["versions"]["torch"]
    # Rank 1's two rows see all others through a circle of 8, and rank 0's three the other four.
    assert [rank["rows_received"] for rank in checks["halos, radius 8, float32"]["ranks"]] == [4, 5, 5]
    largest = checks["neighbours, 94.4 MB"]["ranks"]
    assert [rank.get("with") for rank in largest] == [1, 2, None]
    assert largest[0]["gigabytes_per_second"] == pytest.approx(0.0944 / largest[0]["median_seconds"])
    assert len(largest[0]["seconds"]) == 5
    # 512 queries of 24 heads of 128 in float32; exact: the weights too, and before them their maximum.
    sizes = [checks[f"all-reduce of FLUX's text, {mode}"]["ranks"][0]["bytes"] for mode in ("average", "exact")]
    assert sizes == [512 * 24 * 128 * 4, 512 * 24 * (128 + 1 + 1) * 4]


def test_a_report_on_stdout() -> None:
    status, output, errors = verify("--nproc", "2", "--json", "-")
    assert status == 0, errors
    assert json.loads(output)["world_size"] == 2
    passed = sum(line.startswith("pass  ") for line in errors.splitlines())
    assert passed > 20 and f"all {passed} checks passed in " in errors


def test_one_rank_has_no_neighbours() -> None:
    status, output, errors = verify("--nproc", "1")
    assert status == 0
    assert errors.splitlines() == ["clear-dist: one rank: no halos, nothing between neighbours; for these: --nproc 2"]
    assert "halos" not in output and "neighbours" not in output
    assert "tiny FLUX" in output


def test_a_failed_check_is_named_and_ends_with_1(tmp_path: Path) -> None:
    file = tmp_path / "verify.json"
    status, output, errors = faulty(faults.RowsInWrongOrder, nproc=3, output=str(file))
    assert status == 1
    assert len(errors) == 1
    checks = sum(line.startswith(("pass  ", "FAIL  ")) for line in output)
    said = f"clear-dist: 6 of {checks} checks failed: halos, radius 8, float32 (rank 1: exchange 1: keys"
    assert errors[0].startswith(said)
    failures = [line for line in output if line.startswith("FAIL")]
    assert len(failures) == 6
    assert output[output.index(failures[0]) + 1].startswith("      rank 1: exchange 1: keys of row 0")
    assert json.loads(file.read_text())["passed"] is False


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (faults.KilledInAnExchange, "clear-dist: rank 1 was killed by SIGKILL (out of memory?)"),
        (faults.RaisesInAnExchange, "clear-dist: rank 1 failed: RuntimeError: in the check of halos: ZeroDivisionError: by nothing (for the traceback: --traceback)"),
        (faults.HangsInAnExchange, "clear-dist: rank 0 lost contact with another rank: rank 1 is gone: "),
    ],
)  # fmt: skip
def test_ranks_that_die_or_hang_end_the_run(fault: Any, line: str) -> None:
    status, output, errors = faulty(fault)
    assert (status, len(errors)) == (1, 1)
    assert errors[0].startswith(line)
    assert [words.split(":")[0] for words in output] == ["pass  environment"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nproc", "0"], "--nproc must be from 1 to 1024, got 0; nearest: 1"),
        (["--device", "cuda"], "--device cuda needs a GPU that CUDA sees, got "),
        (["--device", "tpu"], "--device must be one of auto, cpu, cuda, got 'tpu'; nearest: cpu"),
        (["--json", "x.txt"], "--json must end in .json, got 'x.txt'; nearest: x.json"),
        (["--json", "nowhere/x.json"], "--json must lie in a folder that exists"),
        (["--model", "demo"], "clear-dist verify has no --model; nearest: clear-dist generate, which has it"),
    ],
)
def test_wrong_requests(arguments: list[str], words: str, tmp_path: Path) -> None:
    status, output, errors = run("verify", *arguments, cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert (status, output, len(errors)) == (2, [], 1)
    assert words in errors[0]


def test_another_number_of_ranks_than_torchrun_started(tmp_path: Path) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    status, _, errors = run("verify", "--nproc", "3", cwd=tmp_path, **place)
    assert status == 2
    assert errors == ["clear-dist: --nproc must be what torchrun started, or left out, got 3; nearest: 2"]


def test_help_is_quick(tmp_path: Path) -> None:
    status, output, errors = run("verify", "--help", cwd=tmp_path)
    assert (status, errors) == (0, [])
    assert all(flag in "\n".join(output) for flag in ("--nproc", "--device", "--json", "--traceback"))


def test_the_table_and_the_lines_say_the_same() -> None:
    right = Finding(name="halos", error=0.0, figure="8 cells")
    wrong = Finding(name="halos", error=float("nan"), figure="8 cells", fault="row 2")
    result = Result(findings=[right, wrong], seconds=0.1)
    assert not result.passed
    assert plain(result) == "FAIL  halos: 8 cells; error nan, at most 0\n      rank 1: row 2"
    terminal = io.StringIO()
    coloured(terminal)(result)
    words = [line.split() for line in terminal.getvalue().splitlines()]
    assert words == [
        ["check", "error", "at", "most", "figure"],
        ["FAIL", "halos", "nan", "0", "8", "cells"],
        ["rank", "1:", "row", "2"],
    ]
    assert result.as_dict()["error"] == "nan"
