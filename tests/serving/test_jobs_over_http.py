"""Streams, jobs, links and formats, through OpenAI's client and without."""

import io
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as http
import numpy as np
import openai
import pytest
from PIL import Image

from tests.patience import PATIENCE
from tests.serving.live import Live, living, tiny_model
from tests.serving.test_server import picture_of

URL = "/v1/images/generations"
LONG = {"prompt": "a hill", "size": "128x128", "steps": 500, "seed": 1}
SECONDS = 120.0 * PATIENCE


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with living(model, tmp_path_factory.mktemp("here"), "--nproc", "2") as server:
        yield server


def begin(server: Live, **rest: Any) -> dict[str, Any]:
    answer = http.post(f"{server.url}{URL}", json=LONG | rest, headers={"Prefer": "respond-async"})
    assert answer.status_code == 202, answer.text
    assert answer.headers["Location"] == f"/v1/jobs/{answer.json()['id']}"
    return answer.json()


def job_in(server: Live, name: str, *states: str) -> dict[str, Any]:
    """The job once it is in one of these states."""
    deadline = time.monotonic() + SECONDS
    while (job := http.get(f"{server.url}/v1/jobs/{name}").json())["status"] not in states:
        assert time.monotonic() < deadline and job["status"] in ("queued", "running"), job
        time.sleep(0.02)
    return job


def test_a_stream_shows_partial_images_and_then_the_picture(server: Live) -> None:
    given: dict[str, Any] = {"prompt": "a fox", "size": "64x64", "extra_body": {"steps": 8, "seed": 3}}
    events = list(server.client().images.generate(stream=True, partial_images=2, **given))
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert events[-1].usage.output_tokens == 16 and events[-1].usage.input_tokens > 2
    shown = [np.asarray(picture_of(event.b64_json)).astype(int) for event in events]
    final = picture_of(server.client().images.generate(**given).data[0].b64_json)
    assert np.array_equal(shown[-1], np.asarray(final))
    distances = [np.abs(picture - shown[-1]).mean() for picture in shown]
    assert distances[0] > distances[1] > distances[2] == 0


def test_a_stream_without_partial_images(server: Live) -> None:
    events = list(server.client().images.generate(prompt="a fox", size="64x64", stream=True, extra_body={"steps": 2}))
    assert [event.type for event in events] == ["image_generation.completed"]


def test_several_pictures_in_each_format(server: Live) -> None:
    formats: tuple[tuple[Any, str], ...] = (("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP"))
    for name, kind in formats:
        answer = server.client().images.generate(
            prompt="a fox", n=2, size="64x64", output_format=name, extra_body={"steps": 2, "seed": 3}
        )
        assert answer.data is not None and answer.usage is not None
        first, second = (picture_of(each.b64_json) for each in answer.data)
        assert first.format == kind and answer.output_format == name
        assert np.abs(np.asarray(first).astype(int) - np.asarray(second)).mean() > 5, "other noise for each"
        assert answer.usage.output_tokens == 2 * 16


def test_compression(server: Live) -> None:
    def size(compression: int) -> int:
        answer = server.client().images.generate(
            prompt="a fox",
            size="64x64",
            output_format="jpeg",
            output_compression=compression,
            extra_body={"seed": 1, "steps": 1},
        )
        return len(answer.data[0].b64_json or "") if answer.data else 0

    assert 0 < size(5) < size(95)


def test_links(server: Live) -> None:
    answer = server.client().images.generate(
        prompt="a fox", n=2, size="64x64", response_format="url", extra_body={"steps": 1}
    )
    assert answer.data is not None
    for each in answer.data:
        assert each.url is not None
        got = http.get(each.url)
        assert got.headers["Content-Type"] == "image/png" and Image.open(io.BytesIO(got.content)).size == (64, 64)
        part = http.get(each.url, headers={"Range": "bytes=0-7"})
        assert part.status_code == 206 and part.content == got.content[:8]
        folder = each.url.rpartition("/")[0]
        for other in ("job.json", "..%2Fjob.json", "picture-2.png", "%2e%2e"):
            assert http.get(f"{folder}/{other}").status_code == 404


def test_a_job_tells_how_far_it_is(server: Live) -> None:
    name = begin(server, prompt="a long way", steps=20)["id"]
    running = job_in(server, name, "running")
    assert running["stages"] == [{"size": "128x128", "steps": 20, "refines": False}]
    done = job_in(server, name, "succeeded")
    assert done["progress"] == 1 and done["seconds"] > 0 and len(done["images"]) == 1
    assert http.get(f"{server.url}{done['images'][0]}").headers["Content-Type"] == "image/png"
    listed = http.get(f"{server.url}/v1/jobs?limit=1").json()["data"]
    assert [each["id"] for each in listed] == [name]
    assert http.delete(f"{server.url}/v1/jobs/{name}").status_code == 200
    assert http.get(f"{server.url}/v1/jobs/{name}").status_code == 404
    assert http.get(f"{server.url}{done['images'][0]}").status_code == 404


def test_a_job_is_cancelled_and_the_next_one_is_right(server: Live) -> None:
    given: dict[str, Any] = {"prompt": "a fox", "size": "64x64", "extra_body": {"steps": 2, "seed": 3}}
    before = server.client().images.generate(**given).data[0].b64_json
    name = begin(server)["id"]
    waiting = begin(server)["id"]
    job_in(server, name, "running")
    for each in (waiting, name):
        assert http.delete(f"{server.url}/v1/jobs/{each}").status_code in (200, 202)
    assert job_in(server, waiting, "cancelled")["step"] == 0
    stopped = job_in(server, name, "cancelled")
    assert stopped["step"] < 500 and stopped["images"] == [] and stopped["error"]["code"] == "cancelled"
    assert server.client().images.generate(**given).data[0].b64_json == before


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_takes_its_job_with_it(server: Live, stream: bool) -> None:
    body = json.dumps(LONG | {"prompt": f"gone {stream}", "stream": stream}).encode()
    address = http.URL(server.url)
    with socket.create_connection((address.host, address.port)) as client:
        head = f"POST {URL} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        deadline = time.monotonic() + SECONDS
        while (jobs := running_jobs(server))[-1:] != [f"gone {stream}"]:
            assert time.monotonic() < deadline, jobs
            time.sleep(0.05)
        (job,) = http.get(f"{server.url}/v1/jobs?limit=1").json()["data"]
    assert job_in(server, job["id"], "cancelled")["step"] < 500


def running_jobs(server: Live) -> list[str]:
    """Prompts of those that are being drawn."""
    jobs = http.get(f"{server.url}/v1/jobs").json()["data"]
    return [job["asked"]["prompt"] for job in jobs if job["status"] == "running"]


def test_too_many_are_told_to_come_back(server: Live) -> None:
    names = [begin(server)["id"]]
    job_in(server, names[0], "running")
    names += [begin(server)["id"] for _ in range(4)]
    with pytest.raises(openai.RateLimitError) as caught:
        server.client().images.generate(prompt="a fox", size="64x64")
    assert int(caught.value.response.headers["Retry-After"]) >= 1
    for name in names[::-1]:
        http.delete(f"{server.url}/v1/jobs/{name}")
    assert job_in(server, names[0], "cancelled")
    server.client().images.generate(prompt="a fox", size="64x64", extra_body={"steps": 1})


def test_nothing_is_both_streamed_and_left(server: Live) -> None:
    answer = http.post(f"{server.url}{URL}?async=true", json=LONG | {"stream": True})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "stream"


def test_a_job_outlives_its_server(model: Path, tmp_path: Path) -> None:
    with living(model, tmp_path) as server:
        first, second = (begin(server, seed=seed, steps=60)["id"] for seed in (1, 2))
        job_in(server, first, "running")
    with living(model, tmp_path) as server:
        done = [job_in(server, name, "succeeded") for name in (first, second)]
        assert [each["asked"]["seed"] for each in done] == [1, 2]


def test_pictures_make_room_for_newer_ones(model: Path, tmp_path: Path) -> None:
    with living(model, tmp_path, "--keep-gb", "0.0001") as server:
        links = []
        for seed in range(5):
            answer = server.client().images.generate(
                prompt="a fox", size="128x128", response_format="url", extra_body={"steps": 1, "seed": seed}
            )
            assert answer.data is not None
            links.append(answer.data[0].url or "")
        assert http.get(links[0]).status_code == 404 and http.get(links[-1]).status_code == 200
        kept = sum(file.stat().st_size for file in (tmp_path / "results").rglob("*.png"))
        assert kept < 1e5 + len(http.get(links[-1]).content)
