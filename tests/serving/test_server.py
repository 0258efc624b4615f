"""`clear-dist serve` from the command to OpenAI's client, on one rank and on two."""

import base64
import io
import os
import signal
from pathlib import Path
from typing import Any

import httpx2 as http
import numpy as np
import openai
import pytest
from PIL import Image

import clear_dist
from clear_dist.cli import main
from clear_dist.parallelize import parallelize
from tests.launch.test_ranks import ended
from tests.serving.live import Live, arguments, living, tiny_model
from tests.tiny import make_tiny_pipeline

OWN = {"steps": 2, "seed": 5}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def server(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with living(model, tmp_path_factory.mktemp("here"), "--nproc", str(request.param)) as server:
        yield server


def picture_of(encoded: str | None) -> Image.Image:
    assert encoded is not None
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def test_a_picture_is_that_of_the_library(server: Live) -> None:
    """Text attention is exact, so that any number of ranks draws what one does."""
    answer = server.client().images.generate(prompt="a red fox", size="96x64", extra_body=OWN)
    assert answer.data is not None and answer.usage is not None
    assert answer.size == "96x64" and answer.output_format == "png"
    assert answer.usage.output_tokens == 6 * 4
    pipe = make_tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    handle = parallelize(pipe, window="full")
    drawn = clear_dist.generate(pipe, "a red fox", height=64, width=96, num_inference_steps=2, seed=5)[0]
    handle.undo()
    picture = picture_of(answer.data[0].b64_json)
    assert picture.text["prompt"] == "a red fox" and picture.text["seed"] == "5"  # type: ignore[attr-defined]
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(drawn)).max() <= 1


def test_the_model_is_listed(server: Live) -> None:
    listed = [each.id for each in server.client().models.list()]
    assert len(listed) == 1
    assert server.client().models.retrieve(listed[0]).id == listed[0]
    server.client().images.generate(prompt="a", model=listed[0], size="64x64", extra_body={"steps": 1})
    with pytest.raises(openai.NotFoundError, match="must be"):
        server.client().images.generate(prompt="a", model="another", size="64x64")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a size that is none": ({"size": "big"}, "size"),
    "a size in no whole tokens": ({"size": "100x64"}, "size"),
    "a size beyond the server's": ({"size": "144x64"}, "size"),
    "too many pictures": ({"n": 11}, "n"),
    "too many steps": ({"extra_body": {"steps": 501}}, "steps"),
    "an unknown parameter": ({"extra_body": {"stepz": 5}}, "stepz"),
    "another window": ({"extra_body": {"window": 3}}, "window"),
    "no way of refining": ({"extra_body": {"refine": "magic"}}, "refine"),
    "strength without a picture": ({"extra_body": {"strength": 0.5}}, "strength"),
    "an empty prompt": ({"prompt": ""}, "prompt"),
    "compression of a png": ({"output_compression": 50}, "output_compression"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests_are_refused_in_openais_shape(server: Live, name: str) -> None:
    given, parameter = WRONG[name]
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().images.generate(**{"prompt": "a", "size": "64x64"} | given)
    error = caught.value
    assert (error.status_code, error.type, error.param) == (400, "invalid_request_error", parameter)


def test_bodies_that_are_no_requests(server: Live) -> None:
    url = f"{server.url}/v1/images/generations"
    json_type = {"Content-Type": "application/json"}
    for body in (b"{", b"[]", b'"a"', b'{"prompt": "\\ud800"}', b'{"prompt": "a", "seed": 1e400}', b"\xff"):
        answer = http.post(url, content=body, headers=json_type)
        assert answer.status_code == 400 and set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert http.get(f"{server.url}/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    assert http.get(url).status_code == 405
    large = http.post(url, content=b" " * 51_000_000, headers=json_type)
    assert large.status_code == 413 and large.json()["error"]["code"] == "too_large"


def test_pages_of_other_sites_cannot_ask(server: Live) -> None:
    """Without a key the browser's user would draw for them, also by a name of theirs that leads here."""
    foreign = http.get(f"{server.url}/v1/models", headers={"Origin": "https://example.org"})
    renamed = http.get(f"{server.url}/v1/models", headers={"Host": "example.org"})
    own = http.get(f"{server.url}/v1/models", headers={"Origin": server.url})
    assert [each.status_code for each in (foreign, renamed, own)] == [403, 403, 200]


def test_a_key_is_asked_for(model: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("s3cret\n")
    with living(model, tmp_path, "--api-key-file", str(tmp_path / "key")) as server:
        assert len(list(server.client("s3cret").models.list())) == 1
        for wrong in ("s3cre", "s3crets", "none"):
            with pytest.raises(openai.AuthenticationError):
                server.client(wrong).models.list()
        assert http.get(f"{server.url}/health").json() == {"status": "ready", "queue": 0}
        assert "s3cret" not in server.process.said()


def test_no_key_no_network(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CLEAR_DIST_API_KEY", raising=False)
    for flags in (("--host", "0.0.0.0"), ("--api-key-file", "none"), ("--port", "70000"), ("--max-images", "11")):
        with pytest.raises(SystemExit) as ending:
            main(arguments(model, tmp_path, *flags))
        assert ending.value.code == 2


def test_a_rank_that_dies_ends_the_server(model: Path, tmp_path: Path) -> None:
    with living(model, tmp_path, "--nproc", "2") as server:
        ranks = children(server.process.pid)
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        _, errors = server.process.communicate()
        assert server.process.returncode == 1 and "killed by SIGKILL" in errors
        assert ended(ranks)


def test_a_port_that_is_taken_is_refused(server: Live, model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ending:
        main([*arguments(model, tmp_path), "--port", server.url.rpartition(":")[2]])
    assert ending.value.code == 2


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_it_ends_when_asked(model: Path, tmp_path: Path, number: signal.Signals, ranks: str) -> None:
    with living(model, tmp_path, "--nproc", ranks) as server:
        pids = children(server.process.pid)
        assert server.end(number) == 130
        assert ended(pids)
