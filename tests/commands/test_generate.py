"""`clear-dist generate` from the command to the files, with a tiny pipeline: in this process, on ranks, with faults."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load_file

from clear_dist.cli import main
from clear_dist.request.devices import missing_compiler
from tests.forked import Forked, forked
from tests.launch.test_ranks import ended, is_alive
from tests.tiny import make_clear_weights, make_tiny_flux

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "clear-dist")
SECONDS_AT_IMPORT = 0.8
"""A rank's: by then it has loaded the model and is in the midst of steps."""
QUICK = ("--res", "64", "--steps", "2", "--seed", "5", "--device", "cpu", "--max_sequence_length", "16", "--quiet")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_flux(tmp_path_factory.mktemp("model"))
    make_clear_weights(FluxPipeline.from_pretrained(folder).transformer, folder / "clear_local_2.safetensors")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def generate(model: Path, *arguments: str) -> int:
    """Exit status, of a run in this process."""
    with pytest.raises(SystemExit) as ending:
        main(["generate", "--model", str(model), *QUICK, *arguments])
    return int(ending.value.code or 0)


def launch(model: Path, *arguments: str, launcher: tuple[str, ...] = (sys.executable,)) -> subprocess.Popen[str]:
    """Run `generate` as a user would, in its own session; ranks share the cores, whatever these tests have."""
    command = [*launcher, SCRIPT, "generate", "--model", str(model), *QUICK, *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)


def start_on_ranks(model: Path, *arguments: str) -> Forked:
    """`launch` without the seconds of imports."""
    return forked(partial(main, ["generate", "--model", str(model), *QUICK, *arguments]))


def generate_on_ranks(model: Path, *arguments: str) -> int | None:
    """In a process of its own: this one may have run OpenMP's threads, after which a fork may hang."""
    process = start_on_ranks(model, *arguments)
    process.communicate()
    return process.returncode


def test_one_picture(model: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(model, "a red fox") == 0
    assert os.listdir(here) == ["clear-dist.png"]
    with Image.open("clear-dist.png") as picture:
        assert picture.size == (64, 64)
        assert (picture.text["prompt"], picture.text["seed"]) == ("a red fox", "5")  # type: ignore[attr-defined]
        assert json.loads(picture.text["settings"])["window"] == 2  # type: ignore[attr-defined]
    output = capsys.readouterr()
    assert output.out.startswith("output=clear-dist.png seed=5 size=64x64 ranks=1 seconds=")
    assert output.out.count("\n") == 1
    assert output.err == ""


def test_many_prompts_with_one_load(model: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompts.txt").write_text("a red fox\ntwo dogs\n")
    files = ("--prompts", "prompts.txt", "--output", "x.webp", "--report", "r.json")
    assert generate(model, "--num_images", "2", *files) == 0
    assert sorted(os.listdir(here)) == ["prompts.txt", "r.json", "x-0.webp", "x-1.webp", "x-2.webp", "x-3.webp"]
    assert len(json.loads(Path("r.json").read_text())["seconds_per_step"]) == 4
    pictures = [Path(f"x-{index}.webp").read_bytes() for index in range(4)]
    assert len(set(pictures)) == 4
    assert capsys.readouterr().out.count("output=") == 4


def test_a_drawn_seed_is_told_and_draws_the_same_again(
    model: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--model", str(model), "--res", "64", "--steps", "1", "--device", "cpu"])
    seed = capsys.readouterr().out.split("seed=")[1].split()[0]
    first = Path("clear-dist.png").read_bytes()
    assert generate(model, "--steps", "1", "--max-sequence-length", "512", "--seed", seed) == 0
    assert Path("clear-dist.png").read_bytes() == first


def test_many_prompts_on_three_ranks_are_those_on_one(model: Path, here: Path) -> None:
    Path("prompts.txt").write_text("a red fox\ntwo dogs\n")
    guided = ("--negative-prompt", "fog", "--true-cfg-scale", "2", "--text-attention", "exact")
    for ranks in ("1", "3"):
        pictures = ("--prompts", "prompts.txt", "--num_images", "2", "--latents-out", f"{ranks}.safetensors")
        assert generate_on_ranks(model, *pictures, *guided, "--nproc", ranks) == 0
    one, three = (load_file(f"{ranks}.safetensors")["latents"] for ranks in (1, 3))
    assert one.shape == (4, 16, 64)
    assert (three - one).norm() < 1e-4 * one.norm()


def test_negative_prompts_change_the_picture(model: Path, here: Path) -> None:
    for name, arguments in {"a.png": (), "b.png": ("--negative-prompt", "dogs", "--true-cfg-scale", "4")}.items():
        assert generate(model, "a fox", "--output", name, *arguments) == 0
    assert Path("a.png").read_bytes() != Path("b.png").read_bytes()


def test_what_is_cut_off_a_long_prompt_is_said(model: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(model, "abcdefghij klmn") == 0
    assert "longer than the 16 tokens that T5 takes here; cut off: 'n'" in capsys.readouterr().err


def test_weights_that_lack_a_tensor_are_refused(model: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.request.test_settle import retensor

    broken = shutil.copytree(model, here / "broken")
    retensor(broken / "vae/diffusion_pytorch_model.safetensors", lambda tensors: tensors.pop("decoder.conv_in.weight"))
    assert generate(broken, "a fox") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "decoder.conv_in.weight" in lines[0]


def test_two_ranks_give_stock_latents_and_a_report(model: Path, here: Path) -> None:
    files = ("--latents_out", "l.safetensors", "--report", "r.json")
    process = launch(model, "a fox", "--nproc", "2", "--window", "full", "--cut", "columns", *files)
    output, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert "ranks=2" in output
    pipe = FluxPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    sizes = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 16}
    stock = pipe("a fox", generator=generator, output_type="latent", **sizes).images
    torch.testing.assert_close(load_file("l.safetensors")["latents"], stock, rtol=1e-4, atol=1e-4)
    report = json.loads(Path("r.json").read_text())
    assert (report["cut"], report["stripes"]) == ("columns", [[0, 2], [2, 4]])
    assert [len(rank["join_bytes"]) for rank in report["comm"]] == [2, 2]
    assert set(report["seconds"]) == {"launch", "load", "text", "encode", "denoise", "decode", "save", "total"}


def has_begun(process: subprocess.Popen[str]) -> bool:
    """Whether it handles SIGTERM, which Python by itself does not."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return bool(int(status.split("SigCgt:")[1].split()[0], 16) >> (signal.SIGTERM - 1) & 1)


AT_IMPORT = [
    ("", 1),
    ("", 2),
    ("libtorch_cpu", 2),
    ("_multiarray_umath", 1),
    ("_safetensors_rust", 2),
    ("tokenizers", 1),
]


@pytest.mark.parametrize(("library", "nproc"), AT_IMPORT)
def test_an_interrupt_while_libraries_are_imported(model: Path, here: Path, library: str, nproc: int) -> None:
    """At once, and as soon as one of them is mapped: of torch, NumPy, diffusers' and transformers'."""
    process = launch(model, "a fox", "--window", "full", "--nproc", str(nproc), "--steps", "1000")
    while not (has_begun(process) and library in Path(f"/proc/{process.pid}/maps").read_text()):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate()
    assert (process.returncode, output, errors) == (130, "", "clear-dist: interrupted\n")
    assert os.listdir(here) == []


def processor_seconds(pid: int) -> float:
    """Seconds in user mode; 0 once it has ended."""
    with suppress(FileNotFoundError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11]) / os.sysconf("SC_CLK_TCK")
    return 0.0


def ranks_at_work(process: Forked, size: int) -> list[int]:
    """The launcher's children, once they have computed for a while."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(children.read_text().split()) < size:
        assert is_alive(process.pid)
        time.sleep(0.1)
    ranks = [int(pid) for pid in children.read_text().split()]
    while min(map(processor_seconds, ranks)) < SECONDS_AT_IMPORT:
        assert all(map(is_alive, ranks))
        time.sleep(0.05)
    return ranks


def test_a_stale_run_reports_its_buffers(model: Path, here: Path) -> None:
    stale = ("--schedule", "stale", "--warmup-steps", "1", "--report", "r.json")
    process = start_on_ranks(model, "a fox", "--nproc", "2", "--text-attention", "exact", *stale)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    report = json.loads(Path("r.json").read_text())
    # Two layers: a halo of one row of 4 tokens, and the text's maximum, output and weight, in float32.
    assert report["stale_buffer_bytes"] == [2 * 4 * (2 * 4 * 32 + 16 * 2 * 18)] * 2
    assert (report["settings"]["schedule"], report["settings"]["warmup_steps"]) == ("stale", 1)
    text = [rank["text_bytes_reduced"] for rank in report["comm"]]
    assert text == [[2 * 4 * 16 * 2 * 18, 2 * 4 * 16 * 2 * 17]] * 2


def test_hoisted_modulation_draws_the_same_picture(model: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(model, "--latents-out", "stock.safetensors") == 0
    assert generate(model, "--latents-out", "hoisted.safetensors", "--hoist_modulation", "--report", "r.json") == 0
    assert "--hoist-modulation has no effect on a CPU" in capsys.readouterr().err
    assert json.loads(Path("r.json").read_text())["settings"]["hoist_modulation"] is True
    stock, hoisted = (load_file(f"{name}.safetensors")["latents"] for name in ("stock", "hoisted"))
    assert torch.equal(stock, hoisted)


def test_under_torchrun_a_killed_rank_is_told_of_in_one_line(model: Path, here: Path) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3")
    long = ("--steps", "1000", "--warmup-steps", "1", "--schedule", "stale", "--preview-every", "2")
    process = launch(model, "a fox", "--text-attention", "exact", *long, launcher=torchrun)
    while not os.listdir(here):  # a preview: the second step is over
        assert is_alive(process.pid)
        time.sleep(0.1)
    ranks = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(ranks[1], signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == 1
    (line,) = (found for found in errors.splitlines() if found.startswith("clear-dist: ") and "warning" not in found)
    # Whichever is quicker: a rank that notices, or torchrun, which ends the others.
    told = r"lost contact with another rank: .*|was ended by torchrun, which lost another rank or was ended itself"
    assert re.fullmatch(rf"clear-dist: rank [02] ({told})", line)
    assert len(ranks) == 3 and ended(ranks)


@pytest.mark.skipif(missing_compiler("cpu") is not None, reason="torch.compile needs a C++ compiler")
def test_compiled_parts_draw_the_same_picture(model: Path, here: Path) -> None:
    for name, flags in (("eager", ()), ("compiled", ("--compile",))):
        files = ("--latents-out", f"{name}.safetensors", "--report", f"{name}.json")
        assert generate(model, *files, *flags) == 0
    reports = {name: json.loads(Path(f"{name}.json").read_text()) for name in ("eager", "compiled")}
    assert [reports[name]["settings"]["compile"] for name in reports] == [False, True]
    assert reports["eager"]["compile_seconds"] == [0.0]
    assert 0 < reports["compiled"]["compile_seconds"][0] < reports["compiled"]["seconds"]["denoise"]
    eager, compiled = (load_file(f"{name}.safetensors")["latents"] for name in reports)
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("schedule", ["sync", "stale"])
@pytest.mark.parametrize(
    ("fault", "status", "line"),
    [
        ("kill a rank", 1, "clear-dist: rank 1 was killed by SIGKILL (out of memory?)"),
        ("interrupt", 130, "clear-dist: interrupted"),
    ],
)
def test_faults_in_the_middle_end_everything(
    model: Path, here: Path, fault: str, status: int, line: str, schedule: str
) -> None:
    large = ("--steps", "1000", "--res", "512", "--cascade", "off", "--schedule", schedule)
    process = start_on_ranks(model, "a fox", "--nproc", "3", "--text-attention", "exact", *large)
    ranks = ranks_at_work(process, 3)
    if fault == "interrupt":
        os.killpg(process.pid, signal.SIGINT)
    else:
        os.kill(ranks[1], signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == status
    assert [found for found in errors.splitlines() if "warning" not in found] == [line]
    assert ended(ranks)
    assert os.listdir(here) == []
