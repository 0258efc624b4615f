"""Files that are not here are asked for before anything else takes time."""

from pathlib import Path

import pytest

from tests.commands.test_app import run
from tests.hub.server import serving


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("gated", 2, "the hub gives someone/gated only to users who accepted its licence"),
        ("missing", 2, "the hub has no someone/missing"),
        (None, 1, "cannot get someone/tiny from the hub (ConnectError: [Errno 111] Connection refused): check the"),
    ],
)
def test_what_is_wrong_is_told_before_torch_is_loaded(
    tmp_path: Path, name: str | None, status: int, words: str
) -> None:
    (tmp_path / "model_index.json").touch()
    with serving(tmp_path) as hub:
        endpoint = hub.endpoint if name else "http://127.0.0.1:9"  # discard: nobody listens
        place = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
        arguments = ("--model", f"someone/{name or 'tiny'}", "--device", "cpu", "--nproc", "3")
        ended, output, errors = run("generate", "a hill", *arguments, cwd=tmp_path, **place)
    assert (ended, output) == (status, [])
    assert errors[-1].startswith(f"clear-dist: {words}")
