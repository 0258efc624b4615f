"""Downloads, and all the ways in which there are none, with a hub of our own."""

import json
import os
import re
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from diffusers import FluxPipeline
from safetensors.torch import save_file

from clear_dist.cli import main
from clear_dist.launch import ranks
from tests import original_layout
from tests.forked import forked
from tests.hub.server import TOKEN, Hub
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]
ONCE = 2
"""Connections of one question: the library has one of its own, once a day. Its repetitions would be five and more."""
INDEX = "model_index.json"
QUICK = ("--res", "64", "--steps", "1", "--seed", "5", "--device", "cpu", "--max-sequence-length", "16")


def environment(endpoint: str, home: Path, **more: str) -> dict[str, str]:
    ours = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return kept | ranks.QUIET | ours | {"HF_HUB_ETAG_TIMEOUT": str(30 * PATIENCE)} | more


def with_environment(environment: dict[str, str], function: Callable[[], object]) -> object:
    """In a process of its own: the hub's library reads its environment as it is imported, and diffusers imported it."""
    assert "clear_dist.hub" not in sys.modules
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        del sys.modules[name]
    os.environ.clear()
    os.environ.update(environment)
    return function()


def ask(function: Callable[[], object], endpoint: str, home: Path, **more: str) -> tuple[int | None, str, str]:
    """Exit status, stdout and stderr."""
    process = forked(partial(with_environment, environment(endpoint, home, **more), function))
    output, errors = process.communicate()
    return process.returncode, output, errors


def fetch_here(wants: Sequence[tuple[str, str | None, str]]) -> None:
    """One after the other; tells what came of each, and how often a connection was asked for."""
    from clear_dist.families.cards import CARDS
    from clear_dist.hub import Wanted, fetching

    fetching.SECONDS_BETWEEN_FIGURES = 0.4
    connections: list[str] = []
    sys.addaudithook(lambda event, _: connections.append(event) if event == "socket.connect" else None)
    for repository, revision, needed in wants:
        patterns = CARDS.files_of(repository) if needed == INDEX else (needed,)
        wanted = {"repository": repository, "revision": revision, "needed": needed, "patterns": patterns}
        before, told = len(connections), None
        try:
            nearest = "--clear-weights auto" if needed.startswith("clear_local") else "--model demo"
            fetching.fetch([Wanted(**wanted, nearest=nearest)])
        except Exception as error:
            told = [type(error).__name__, str(error)]
        print(json.dumps([told, len(connections) - before]), flush=True)


def fetch(endpoint: str, home: Path, *wants: tuple[str, str | None, str], **more: str) -> tuple[list[Any], str]:
    """For each of (repository, revision, needed file): (kind of error and message, or None; connections); and stderr."""
    _, output, errors = ask(partial(fetch_here, wants), endpoint, home, **more)
    assert "Traceback" not in errors, errors
    return [json.loads(line) for line in output.splitlines()], errors


def generate(hub: Hub, home: Path, *arguments: str, **more: str) -> tuple[int | None, list[str]]:
    """Exit status and the lines on stderr; in this process's folder."""
    status, _, errors = ask(partial(main, ["generate", *QUICK, *arguments]), hub.endpoint, home, **more)
    return status, errors.splitlines()


@pytest.fixture
def refusing() -> Iterator[str]:
    """An address where nobody listens, nor can while a test runs."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_what_the_hub_says_no_to(hub: Hub, tmp_path: Path) -> None:
    wants = {
        ("someone/gated", None, INDEX): (
            "Refusal",
            f"the hub gives someone/gated only to users who accepted its licence: do so on {hub.endpoint}/someone/gated, "
            "then `hf auth login`; nearest: local files (--model or --base FOLDER, --clear-weights FILE, --lora FILE)",
        ),
        ("someone/missing", None, INDEX): (
            "Refusal",
            "the hub has no someone/missing, or does not show it to you (`hf auth login`); nearest: --model demo",
        ),
        ("someone/hidden", None, INDEX): (
            "Refusal",
            "the hub has no someone/hidden, or does not show it to you (`hf auth login`); nearest: --model demo",
        ),
        ("someone/tiny", "v2", INDEX): (
            "Refusal",
            "the revision must be a branch, tag or commit of someone/tiny, got 'v2'; nearest: main",
        ),
        ("someone/tiny", None, "clear_local_16.safetensors"): (
            "Refusal",
            "someone/tiny on the hub must hold clear_local_16.safetensors, and does not; "
            "nearest: --clear-weights someone/tiny:clear_local_2.safetensors",
        ),
        ("some--one/tiny", None, INDEX): (
            "Refusal",
            "a name on the hub must be owner/name, got some--one/tiny (Cannot have -- or .. in repo_id: "
            "'some--one/tiny'.); nearest: --model demo",
        ),
        ("someone/other", None, INDEX): (
            "Refusal",
            "someone/other on the hub must hold model_index.json, and does not; nearest: --model demo",
        ),
    }
    answers, errors = fetch(hub.endpoint, tmp_path, *wants)
    assert errors == ""
    assert [tuple(told) for told, _ in answers] == list(wants.values())
    assert not any("/resolve/" in path for method, path in hub.requests if method == "GET"), "nothing is downloaded"
    others = [path for _, path in hub.requests if "someone/gated" not in path]
    assert len(others) == len(wants) - 2, "one request each, none for what is no name; files tell of a licence"


def test_a_hub_that_does_not_answer_is_given_up_after_the_timeout(hub: Hub, tmp_path: Path) -> None:
    """It would be silent for ever."""
    wants = (("someone/silent", None, INDEX), ("someone/broken", None, INDEX))
    answers, _ = fetch(hub.endpoint, tmp_path, *wants, HF_HUB_ETAG_TIMEOUT=str(2 * PATIENCE))
    (silent, _), (broken, _) = answers
    assert silent[0] == broken[0] == "Failure"
    # Ours, or the library's of equal length where ours is late.
    assert re.match(r"cannot get someone/silent from the hub \((no answer within \d+ s|ReadTimeout: )", silent[1])
    assert silent[1].endswith(
        "): check the network and HF_ENDPOINT, or pass local files (--model or --base FOLDER, --clear-weights FILE, --lora FILE)"
    )
    assert "(down)" in broken[1]
    assert len(hub.requests) == 2, "nothing is asked twice"


def test_there_is_no_hub(refusing: str, tmp_path: Path) -> None:
    ((told, connections),), _ = fetch(refusing, tmp_path, ("someone/tiny", None, INDEX))
    assert told[0] == "Failure"
    assert "Connection refused" in told[1]
    assert 1 <= connections <= ONCE, "it is not tried again"


def test_a_disk_too_small(hub: Hub, folder: Path, tmp_path: Path) -> None:
    ((told, _),), _ = fetch(hub.endpoint, tmp_path, ("someone/huge", None, INDEX))
    wanted = [file for file in hub.files() if file == INDEX or "/" in file]
    needed = len(wanted) * 10**17 / 1e9
    assert told[0] == "Refusal"
    assert told[1].startswith(f"{tmp_path}/hub must have {needed:.1f} GB free to download someone/huge, and has ")
    assert told[1].endswith(" GB; nearest: HF_HOME=FOLDER on a larger disk")
    assert not (tmp_path / "hub").exists()


def test_a_cache_that_cannot_be_written_to(hub: Hub, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    ((told, _),), _ = fetch(hub.endpoint, file, ("someone/tiny", None, INDEX))
    assert told == [
        "Refusal",
        "the hub's files must have a folder that can be written to and has room, "
        f"got {file}/hub (Not a directory); nearest: HF_HOME=FOLDER",
    ]


def test_tokens(hub: Hub, tmp_path: Path) -> None:
    ((told, _),), _ = fetch(hub.endpoint, tmp_path, ("someone/tiny", None, INDEX), HF_TOKEN="hf_expired")
    assert told[0] == "Refusal"
    assert told[1].startswith(
        "the hub does not give someone/tiny to you (Invalid credentials in Authorization header): `hf auth login`"
    )
    ((told, _),), _ = fetch(hub.endpoint, tmp_path, ("someone/gated", None, INDEX), HF_TOKEN=TOKEN)
    assert told is None


def test_what_is_here_serves_without_the_hub(hub: Hub, refusing: str, tmp_path: Path) -> None:
    tiny = ("someone/tiny", None, INDEX)
    answers, errors = fetch(hub.endpoint, tmp_path, tiny, tiny)
    assert [told for told, _ in answers] == [None, None]
    assert all(" downloading " in line for line in errors.splitlines()), "nothing but figures, on a slow machine"
    downloads = [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    assert len(downloads) == len(set(downloads)) == len([file for file in hub.files() if file == INDEX or "/" in file])
    warning = "clear-dist: warning: using someone/tiny as it was downloaded before; the hub did not give it: "
    for endpoint, more, most in (
        (refusing, {}, ONCE),
        (hub.endpoint, {"HF_HUB_OFFLINE": "1"}, 0),
        (hub.endpoint, {"HF_TOKEN": "x"}, ONCE),
    ):
        ((told, connections),), errors = fetch(endpoint, tmp_path, tiny, **more)
        assert told is None
        assert connections <= most
        assert errors.startswith(warning)
        assert errors.count("\n") == 1
    ((told, _),), _ = fetch(refusing, tmp_path, ("someone/tiny", "v2", INDEX))
    assert told[0] == "Failure"


def test_a_long_download_tells_how_far_it_is(hub: Hub, tmp_path: Path) -> None:
    ((told, _),), errors = fetch(hub.endpoint, tmp_path, ("someone/slow", None, INDEX))
    assert told is None
    lines = errors.splitlines()
    assert lines
    figures = r"clear-dist: downloading someone/slow: \d+\.\d of \d+\.\d GB, \d\.\d\d GB/s"
    assert all(re.fullmatch(figures, line) for line in lines), lines


def test_of_three_ranks_one_asks(hub: Hub, folder: Path, tmp_path: Path) -> None:
    asked_for = (
        "--model",
        "someone/tiny",
        "--clear-weights",
        "someone/clear:clear_local_2.safetensors",
        "--nproc",
        "3",
    )
    command = [sys.executable, str(ROOT / "clear-dist"), "generate", *QUICK, *asked_for]
    environ = environment(hub.endpoint, tmp_path / "home")
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "clear-dist.png").exists()
    asked = list(hub.requests)
    assert max(Counter(asked).values()) == 3, "before anything starts, dry, then to download"
    files = [file for file in hub.files() if file == INDEX or "/" in file]
    downloads = [path for method, path in asked if method == "GET" and "/resolve/" in path]
    assert len(downloads) == len(files) + 1
    status, errors = generate(hub, tmp_path / "home", *asked_for, HF_HUB_OFFLINE="1")
    assert status == 0, errors
    assert hub.requests == asked
    assert any("warning: using someone/tiny as it was downloaded before" in line for line in errors)


@pytest.mark.parametrize(
    ("arguments", "status", "words", "requests"),
    [
        (("--model", "someone/gated"), 2, "only to users who accepted its licence", 2),
        (("--model", "someone/tiny", "--revision", "v2"), 2, "got 'v2'; nearest: main", 1),
        (("--model", "someone/silent"), 1, "cannot get someone/silent from the hub (", 1),
        (("--clear-weights", "someone/tiny:clear_local_8.safetensors"), 2, "must hold clear_local_8.safetensors", 1),
    ],
)
def test_three_ranks_tell_it_once(
    hub: Hub, tmp_path: Path, arguments: tuple[str, ...], status: int, words: str, requests: int
) -> None:
    patience = {"HF_HUB_ETAG_TIMEOUT": str(2 * PATIENCE)} if "someone/silent" in arguments else {}
    ended, errors = generate(hub, tmp_path / "home", *arguments, "--nproc", "3", **patience)
    said = [line for line in errors if line.startswith("clear-dist: ") and "warning" not in line]
    assert ended == status, errors
    assert words in said[-1]
    assert sum(words in line for line in errors) == 1
    assert not any("Traceback" in line for line in errors)
    assert len([path for _, path in hub.requests if path.startswith("/api/")]) == requests
    assert len(hub.requests) == len(set(hub.requests)), "nothing is asked twice"
    assert not any("/resolve/" in path for method, path in hub.requests if method == "GET"), "nothing is downloaded"
    assert not (tmp_path / "clear-dist.png").exists()


def test_a_lora_of_the_hub_is_the_local_file(hub: Hub, folder: Path, tmp_path: Path) -> None:
    common = ("--model", str(folder), "--nproc", "2", "--latents-out", "latents.safetensors")
    drawn = []
    for source in ("someone/tiny:style.safetensors:0.5", f"{folder / 'style.safetensors'}:0.5"):
        ended, errors = generate(hub, tmp_path / "home", *common, "--lora", source)
        assert ended == 0, errors
        drawn.append((tmp_path / "latents.safetensors").read_bytes())
    assert drawn[0] == drawn[1]
    assert any("style.safetensors" in path for _, path in hub.requests)


def test_a_single_file_takes_only_what_it_lacks(hub: Hub, folder: Path, tmp_path: Path) -> None:
    """Tokenizers, configurations and the VAE; the second time nobody is asked."""
    pipe = FluxPipeline.from_pretrained(folder)
    save_file(original_layout.flux(pipe.transformer.state_dict()), file := tmp_path / "tiny.safetensors")
    save_file(original_layout.clip(pipe.text_encoder.state_dict()), tmp_path / "clip_l.safetensors")
    save_file(original_layout.t5(pipe.text_encoder_2.state_dict()), tmp_path / "t5xxl_fp16.safetensors")
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        status, errors = generate(hub, tmp_path / "home", "--model", str(file), "--base", "someone/tiny", **more)
        assert status == 0, errors
    weights = {path for method, path in hub.requests if method == "GET" and path.endswith(".safetensors")}
    assert {path.split("/")[-2] for path in weights} == {"vae"}
