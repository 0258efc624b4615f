"""first_hour.sh with a `python` that does nothing, and what it starts first and last; on GPUs: tests/cuda."""

import gzip
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from benchmarks.gpu import archive, ready
from clear_dist.request import devices

SCRIPT = Path(archive.__file__).with_name("first_hour.sh")
STEPS = ["ready", "verify", "weights", "1024", "alone", "large", "official", "table10", "table7", "suite"]
PYTHON = """#!/usr/bin/env bash
echo "$*" >> {folder}/calls
case "$*" in
-c*) exec {python} "$@" ;;
*gpu.ready*--fetch*) {weights} ;;
*gpu.ready*) {ready} ;;
*verify*) {verify} ;;
*plan*) {plan} ;;
esac
"""
WELL = {"ready": "echo gpus=2 gigabytes=85 name=G", "verify": ":", "weights": ":", "plan": "echo '{\"nearest\": null}'"}


class Hour:
    """The script beside such a `python`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, *flags: str, **facts: object) -> tuple[int, dict[str, str]]:
        """Exit status and the state of each step."""
        fake = self.folder / "bin" / "python"
        fake.parent.mkdir(exist_ok=True)
        (self.folder / "calls").write_text("")
        fake.write_text(PYTHON.format(**WELL | facts, folder=self.folder, python=sys.executable))
        fake.chmod(0o755)
        path = f"{fake.parent}{os.pathsep}{os.environ['PATH']}"
        ended = subprocess.run(
            [SCRIPT, *flags], cwd=self.folder, env=os.environ | {"PATH": path}, capture_output=True, text=True
        )
        self.out = ended.stdout + ended.stderr
        lines = [line.split("\t") for line in self.file("steps.tsv").read_text().splitlines()]
        return ended.returncode, {name: state for name, state, *_ in lines}

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()

    def file(self, name: str) -> Path:
        return self.folder / "clear-dist-first-hour" / name


@pytest.fixture
def hour(tmp_path: Path) -> Hour:
    return Hour(tmp_path)


def test_all_steps_are_done_and_not_done_again(hour):
    assert hour.run() == (0, dict.fromkeys(STEPS, "done"))
    drawn = [call for call in hour.calls if "clear_dist generate" in call]
    assert [call.count("--nproc 2 ") for call in drawn] == [1, 0, 1]
    assert ["--res 1024" in call for call in drawn] == [True, True, False] and "--res 4096" in drawn[2]
    assert "--model black-forest-labs/FLUX.1-dev --clear-weights auto" in drawn[0]
    assert hour.calls[-1].startswith("-m benchmarks.gpu.archive")
    assert hour.run() == (0, dict.fromkeys(STEPS, "done"))
    assert [call.split()[1] for call in hour.calls] == ["benchmarks.gpu.ready", "benchmarks.gpu.archive"]
    assert hour.out.count("done before") == len(STEPS) - 1


def test_a_step_that_fails_is_noted_and_tried_again(hour):
    status, states = hour.run(verify="echo 'clear-dist: a halo is wrong'; exit 1")
    assert (status, states) == (1, dict.fromkeys(STEPS, "done") | {"verify": "failed"})
    assert "a halo is wrong" in hour.out
    assert hour.run() == (0, dict.fromkeys(STEPS, "done"))


def test_without_gpus_nothing_else_is_tried(hour):
    status, states = hour.run(ready="echo 'clear-dist: there is no GPU'; exit 2")
    assert (status, states) == (1, {"ready": "failed"})
    assert "there is no GPU" in hour.out


def test_without_weights_the_rest_is_done(hour):
    status, states = hour.run(weights="echo 'clear-dist: no licence'; exit 2")
    assert (status, states) == (
        1,
        {"ready": "done", "verify": "done", "weights": "failed", "table10": "done", "table7": "done", "suite": "done"},
    )


def test_on_one_small_gpu_tables_are_left_out_and_settings_that_fit_are_taken(hour):
    status, states = hour.run(
        ready="echo gpus=1 gigabytes=24 name=G", plan='echo \'{"nearest": "--int8 --offload"}\'; exit 2'
    )
    assert (status, states) == (0, {name: "done" for name in STEPS if name not in ("alone", "table10", "table7")})
    assert "need 30 GB, got 24: left out" in hour.out and "--parts correctness ranks kernels tuning" in hour.calls[-2]
    drawn = [call for call in hour.calls if "clear_dist generate" in call]
    assert all("--int8 --offload" in call for call in drawn)


def test_out_of_time(hour):
    impatient = hour.folder / "bin" / "timeout"
    impatient.parent.mkdir()
    impatient.write_text('#!/bin/sh\nshift 2\ncase "$*" in *verify*) exit 124 ;; esac\nexec "$@"\n')
    impatient.chmod(0o755)
    status, states = hour.run()
    assert (status, states) == (1, dict.fromkeys(STEPS, "done") | {"verify": "out of time"})


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_weights_may_be_told_from_the_folder_that_the_user_is_in(kind, hour):
    weights = hour.folder / "clear weights"
    weights.mkdir() if kind == "folder" else weights.touch()
    hour.run("--clear-weights", "clear weights")
    assert f"--clear-weights {weights} " in hour.calls[0]


def test_results_of_other_flags_are_not_taken_for_these(hour):
    hour.run("--small", ready="echo 'clear-dist: no such model'; exit 2")
    assert hour.run("--minutes", "90")[0] == 0  # the first one had no results
    status, _ = hour.run("--small")
    assert status == 2 and not hour.calls
    assert "of the same flags (--model black-forest-labs/FLUX.1-dev --clear-weights auto), got " in hour.out


def test_a_terminal_that_is_closed_ends_the_step(hour):
    status, states = hour.run(verify="kill -HUP $(ps -o ppid= -p $PPID); sleep 60")
    assert (status, states) == (130, {"ready": "done"}) and "the same command goes on from here" in hour.out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--minutes", "1h"), "--minutes must be a whole number from 10 to 9999, got 1h; nearest: 60"),
        (("--model",), "--model needs a value"),
        (("--fast",), "there is no --fast"),
        (("--folder", "/dev/null/x"), "--folder must be one that can be written to"),
    ],
)
def test_wrong_flags(flags, told, tmp_path):
    ended = subprocess.run([SCRIPT, *flags], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2
    assert told in ended.stderr.splitlines()[-1]


def test_help_is_the_script_s_own():
    ended = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True)
    assert ended.returncode == 0 and not ended.stderr
    assert ended.stdout.startswith("Your GPUs' first hour") and "--small" in ended.stdout and "#" not in ended.stdout


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("/no/such/folder", "there is no /no/such/folder"),
        ("black-forest-labs/FLUX.1-dev", "matplotlib, which is missing; nearest: pip install"),
    ],
)
def test_what_is_missing_is_told_first(model, told, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(devices, "gpus_for", lambda device: ())
    monkeypatch.setattr(ready, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        ready.main(["--model", model, "--clear-weights", "auto", "--folder", str(tmp_path)])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("clear-dist: ") and told in line


def test_nothing_private_is_in_an_archive(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-token-of-mine")
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setattr(archive.sys, "prefix", "/home/alice/my env")
    monkeypatch.setattr(archive, "hosts", lambda: {"node17.example.org", "node17"})
    monkeypatch.setattr(archive, "addresses", lambda: ["192.0.2.17"])
    monkeypatch.setattr(archive.getpass, "getuser", lambda: "alice")
    folder = tmp_path / "results"
    (folder / "suite").mkdir(parents=True)
    text = (
        'File "/home/alice/my env/lib/python3.12/site-packages/torch/cuda.py", line 3 on node17 ([192.0.2.17]:29500)\n'
        '{"model": "/data/My Models/flux", "of": "alice@node17.example.org", "used": "a-token-of-mine hf_abcDEF123456"}\n'
        f"{archive.ROOT}/benchmarks/gpu/suite.py ~/notes file:///mnt/alice/x https://huggingface.co/a/b auto 3.1 s/step\n"
    )
    (folder / "verify.log").write_text(text)
    (folder / "suite" / "trace.json.gz").write_bytes(gzip.compress(text.encode()))
    (folder / "picture.png").write_bytes(b"picture")
    (folder / "core").write_bytes(b"not a result")
    file = archive.pack(folder, archive.Private(["/data/My Models/flux", "auto"]))
    assert file == tmp_path / "results.tar.gz"
    with tarfile.open(file) as tar:
        assert tar.getnames() == ["results/picture.png", "results/suite/trace.json.gz", "results/verify.log"]
        assert {(entry.uid, entry.uname, entry.gname) for entry in tar} == {(0, "", "")}
        read = {name: tar.extractfile(name).read() for name in tar.getnames()}
    cleaned = read["results/verify.log"].decode()
    assert gzip.decompress(read["results/suite/trace.json.gz"]).decode() == cleaned
    assert cleaned == (
        'File "torch/cuda.py", line 3 on <host> ([<address>]:29500)\n'
        '{"model": "<path>", "of": "<user>@<host>", "used": "<secret> <secret>"}\n'
        "benchmarks/gpu/suite.py <path> file://<path> https://huggingface.co/a/b auto 3.1 s/step\n"
    )


def test_names_beyond_ascii_are_left_out_of_json_too(monkeypatch):
    monkeypatch.setenv("HOME", "/home/jürgen")
    monkeypatch.setattr(archive.getpass, "getuser", lambda: "jürgen")
    text = json.dumps({"output": "/home/jürgen/a.png", "model": "/data/Bücher/b", "of": "jürgen", "line": "1\n2 é"})
    assert json.loads(archive.Private().removed(text)) == {
        "output": "<path>", "model": "<path>", "of": "<user>", "line": "1\n2 é",
    }  # fmt: skip


def test_the_results_folder_and_what_is_before_a_host_are_left_out(tmp_path, monkeypatch):
    folder = tmp_path / "Alice Smith"
    folder.mkdir()
    (folder / "1024.log").write_text(f"saved {folder}/1024.png by way of https://alice:secret@example.org/mirror")
    monkeypatch.setattr(sys, "argv", ["archive", str(folder)])
    archive.main()
    with tarfile.open(tmp_path / "Alice Smith.tar.gz") as tar:
        cleaned = tar.extractfile("Alice Smith/1024.log").read().decode()
    assert cleaned == "saved <path> by way of https://<secret>@example.org/mirror"


@pytest.mark.parametrize(
    ("planned", "seconds", "gigabytes"),
    [(json.dumps({"seconds": {"all": 9.0}, "needed": 30e9}), 9.0, 30.0), ("", None, None)],
    ids=["planned", "not known to plan"],
)
def test_plans_stand_beside_what_was_measured(planned, seconds, gigabytes, tmp_path):
    (tmp_path / "1024.plan.json").write_text(planned)
    report = {
        "world_size": 2,
        "seconds": {"launch": 5.0, "load": 9.0, "encode": 0.0, "denoise": 0.5, "decode": 0.25, "save": 1.0},
        "peak_memory_bytes": [25e9, 26e9],
        "loading": {"peak_memory_bytes": [28e9, 24e9]},
    }
    (tmp_path / "1024.report.json").write_text(json.dumps(report))
    assert list(archive.beside_plans(tmp_path)) == [
        {
            "picture": "1024",
            "ranks": 2,
            "seconds": 0.75,
            "planned_seconds": seconds,
            "peak_gigabytes": 28.0,
            "planned_gigabytes": gigabytes,
        }
    ]
