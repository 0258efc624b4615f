"""The command line as a user meets it: words in, one line and a status out, and no torch on the way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clear_dist.cli import main
from clear_dist.commands import draw
from clear_dist.commands.app import with_dashes

ROOT = Path(__file__).parents[2]
# Runs `clear-dist`, then tells what was imported.
RUN = """
import atexit, sys
heavy = lambda: [name for name in ("torch", "diffusers", "transformers") if name in sys.modules]
atexit.register(lambda: print(heavy()))
from clear_dist.cli import main
main()
"""


def run(*arguments: str, cwd: Path, **environment: str) -> tuple[int, list[str], list[str]]:
    """Exit status, lines on stdout and on stderr; nothing heavy was imported."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
    )
    *lines, heavy = done.stdout.splitlines()
    assert heavy == "[]"
    return done.returncode, lines, done.stderr.splitlines()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["generate", "--res", "1000"],
            "--res must be a multiple of 16 pixels (one token), got 1000; nearest: 992 or 1008",
        ),
        (
            ["generate", "--res", "many"],
            "--res must be a whole number or WIDTHxHEIGHT from 16 to 16384, got 'many'; nearest: 16",
        ),
        (["generate", "--max_sequence_length=1.5"], "got '1.5'; nearest: 2"),
        (["generate", "--guidance_scale", "nan"], "--guidance-scale must be a number from 0 to 100, got nan"),
        (["generate", "--steps"], "'--steps' requires an argument"),
        (["generate", "--rez", "64"], "No such option: --rez"),
        (
            ["generate", "two", "prompts", "--steps", "2"],
            "must be one argument, got 'two', 'prompts'; nearest: 'two prompts'",
        ),
        (["plan", "a", "lighthouse"], "takes flags only, got 'a lighthouse'"),
        (["generate", "--prompt", "a hill"], "the prompt stands by itself, in quotes; nearest: 'a light"),
        (
            ["upscale", "--image", "x.png"],
            "clear-dist upscale has no --image; it is for clear-dist generate, and upscale takes pictures without a flag",
        ),
        (["generate", "--gpu", "h100"], "clear-dist generate has no --gpu; nearest: clear-dist plan, which has it"),
        (["--res", "64"], "clear-dist has no --res; nearest: clear-dist generate, which has it"),
        (["generate", "--res", "500x512"], "--width must be a multiple of 16 pixels (one token), got 500"),
        (["generate", "--res", "512xmany"], "number or WIDTHxHEIGHT from 16 to 16384, got '512xmany'; nearest: 512"),
        (["generate", "--res", "64x64", "--width", "64"], "--res is both height and width, got --width too"),
        (["upscale", "nowhere.png", "--res", "99999x64"], "--width must be from 16 to 32768, got 99999"),
        (["generate", "--schedule", "late"], "--schedule must be one of sync, stale, got 'late'; nearest: stale"),
        (["generate", "--warmup_steps", "-2"], "--warmup-steps must be from 0 to 1000, got -2; nearest: 0"),
        (["generate", "--model", "/nowhere"], "there is no /nowhere"),
        (["generate", "--output", "picture.gif"], "--output must end in"),
        (["generate", "--device", "cuda"], "--device cuda needs a GPU that CUDA sees, got "),
        (["generate", "--nproc", "99"], "got 99; nearest: 16"),
        (["generate", "--strength", "2"], "--strength must be a number from 0.001 to 1, got 2.0; nearest: 1"),
        (["generate", "--base-res", "4096"], "--base-res must be at most the final 256 px, got 4096; nearest: 256"),
        (["upscale"], "Missing argument 'IMAGE... [PROMPT]'"),
        (["upscale", "nowhere.png"], "a file that can be read, got nowhere.png (No such file or directory)"),
        (["upscale", "x.png", "--steps", "2"], "clear-dist upscale has no --steps; nearest: --upscale-steps"),
        (["verify", "--steps", "2"], "has no --steps; nearest: clear-dist generate, which has it"),
        (["plan", "--gpu-memory", "16gb"], "got '16gb'; nearest: 16"),
        (["x.png", "a hill"], "got 'x.png'; nearest: clear-dist upscale x.png"),
        (
            ["generat"],
            "a command must be one of generate, upscale, serve, plan, verify, distill, evaluate, got 'generat'; nearest: clear-dist generate",
        ),
        (["a lighthouse"], "got 'a lighthouse'; nearest: clear-dist generate 'a lighthouse'"),
        (["the", "sea's", "end", "--res", "64"], """nearest: clear-dist generate 'the sea'"'"'s end'"""),
        (["help"], "got 'help'; nearest: clear-dist --help"),
        (["--"], "a command is needed"),
    ],
)
def test_wrong_requests_get_one_line_and_status_2(arguments: list[str], words: str, tmp_path: Path) -> None:
    status, output, errors = run(*arguments, cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert (status, output, len(errors)) == (2, [], 1), errors
    assert errors[0].startswith("clear-dist: ")
    assert words in errors[0]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["generate", "--help"], ["generate", "-h"], ["upscale", "--help"]]
)
def test_help_is_quick(arguments: list[str], tmp_path: Path) -> None:
    status, output, errors = run(*arguments, cwd=tmp_path)
    assert (status, errors) == (0, [])
    assert any("usage: clear-dist" in line.lower() for line in output)


def test_every_flag_is_in_the_help(tmp_path: Path) -> None:
    text = "\n".join(run("generate", "--help", cwd=tmp_path, COLUMNS="200")[1])
    flags = """--model --revision --res --height --width --steps --num-inference-steps --guidance-scale
        --max-sequence-length --negative-prompt --true-cfg-scale --num-images --prompts --seed --window --clear-weights
        --text-attention --text-tokens --schedule --warmup-steps --attention-backend --dtype --device --nproc --output --latents-out --report --profile
        --cascade --base-res --strength --upscale-steps --ntk-factor --save-stages --preview-every --no-metadata
        --lora --hoist-modulation --compile --float8 --int8 --shard-weights --offload --keep-text-encoder"""
    assert [flag for flag in flags.split() if flag not in text] == []
    assert "owner/name[@revision]:file" in text, "brackets are words here, not rich's markup"


@pytest.mark.parametrize(
    ("words", "found"), [("clear-dist gen", ["generate"]), ("clear-dist plan --schedule ", ["sync", "stale"])]
)
def test_a_shell_is_told_how_words_end(words: str, found: list[str], tmp_path: Path) -> None:
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    assert run(cwd=tmp_path, _CLEAR_DIST_COMPLETE="complete_bash", **asked)[:2] == (0, found)
    assert "completion" not in "".join(run("generate", "--help", cwd=tmp_path)[1])


def test_the_package_is_a_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "clear_dist", "--version"]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, cwd=tmp_path, env=environ, stdout=subprocess.PIPE).stdout == b"clear-dist 0.1.0\n"


def test_a_launcher_without_arguments_tells_its_own(tmp_path: Path) -> None:
    done = subprocess.run(["bash", ROOT / "launchers" / "one_machine.sh"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: one_machine.sh RANKS ")


@pytest.mark.parametrize(("launcher", "first"), [("one_machine", ["2"]), ("several_machines", [])])
def test_a_launcher_keeps_our_flags_from_torchrun(launcher: str, first: list[str], tmp_path: Path) -> None:
    """`torchrun clear-dist generate --nproc 2` is torchrun's `ambiguous option: --nproc`, unless `--` stands before."""
    torchrun = tmp_path / "torchrun"
    torchrun.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    torchrun.chmod(0o755)
    place = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RENDEZVOUS": "a:1", "MACHINES": "2", "RANKS": "2"}
    command = ["bash", str(ROOT / "launchers" / f"{launcher}.sh"), *first, "a hill", "--nproc", "3"]
    given = subprocess.run(command, env=os.environ | place, capture_output=True, text=True).stdout.splitlines()
    assert given[given.index("--") + 1 :] == [str(ROOT / "clear-dist"), "generate", "a hill", "--nproc", "3"]


def test_the_version(tmp_path: Path) -> None:
    assert run("--version", cwd=tmp_path)[:2] == (0, ["clear-dist 0.1.0"])


@pytest.mark.parametrize(
    ("rank", "words"), [("x", "RANK must be a whole number"), ("3", "RANK must be less than WORLD_SIZE")]
)
def test_a_launcher_that_makes_no_sense_is_refused(rank: str, words: str, tmp_path: Path) -> None:
    place = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    status, output, errors = run("generate", cwd=tmp_path, **place)
    assert (status, output, len(errors)) == (2, [], 1)
    assert words in errors[0]


@pytest.mark.parametrize("traceback", [[], ["--traceback"]])
def test_an_error_of_our_own_is_one_line(
    traceback: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def break_down(*_: object) -> None:
        raise ZeroDivisionError("by\nnothing")

    monkeypatch.setattr(draw, "settle", break_down)
    with pytest.raises(SystemExit) as ending:
        main(["generate", *traceback])
    first, *more = capsys.readouterr().err.splitlines()
    assert ending.value.code == 1
    assert first == "clear-dist: failed: ZeroDivisionError: by nothing (for the traceback: --traceback)"
    assert bool(more) == bool(traceback)


def test_a_refusal_on_two_ranks_is_told_once(tmp_path: Path) -> None:
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    lines = []
    for rank in "10":
        own = {"RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_ERROR_FILE": str(tmp_path / rank / "error.json")}
        status, _, errors = run("generate", "--res", "7", cwd=tmp_path, **place, **own)
        assert status == 2
        lines += errors
    assert len(lines) == 1


def test_dashes_and_underscores_are_the_same_in_names_only() -> None:
    given = ["generate", "a_b", "--num_images", "c_d", "--latents_out=e_f", "--", "--g_h"]
    assert with_dashes(given) == ["generate", "a_b", "--num-images", "c_d", "--latents-out=e_f", "--", "--g_h"]


def test_public_names_are_functions_although_a_module_has_the_same_name() -> None:
    import clear_dist
    from clear_dist.drawing.generation import generate
    from clear_dist.parallelize import interrupt, parallelize

    assert (clear_dist.generate, clear_dist.interrupt, clear_dist.parallelize) == (generate, interrupt, parallelize)
