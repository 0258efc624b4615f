"""Pictures that begin with a client's, and LoRA by name; compared with the library on one rank."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as http
import numpy as np
import openai
import pytest
from PIL import Image

import clear_dist
from clear_dist.parallelize import parallelize
from tests.serving.live import Live, living, tiny_model
from tests.serving.test_jobs_over_http import job_in
from tests.serving.test_server import picture_of
from tests.tiny import make_tiny_pipeline
from tests.tiny_lora import add_lora, make_lora, save_lora

SIZE = {"height": 64, "width": 96}
DRAWN: dict[str, Any] = {"prompt": "a red fox", "size": "96x64", "extra_body": {"steps": 4, "seed": 5}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("all")
    tiny_model(folder / "model")
    (folder / "loras").mkdir()
    transformer = make_tiny_pipeline().transformer
    for seed, name in enumerate(("first", "second")):
        save_lora(make_lora(transformer, seed=seed), folder / "loras" / f"{name}.safetensors")
    (folder / "loras" / "broken.safetensors").write_bytes(b"\xff" * 100)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Live]:
    with living(folder / "model", folder, "--nproc", "2", "--lora-dir", str(folder / "loras")) as server:
        yield server


@pytest.fixture(scope="module")
def given() -> Image.Image:
    noise = np.random.default_rng().integers(0, 256, (8, 12, 3), np.uint8)
    return Image.fromarray(noise).resize((96, 64), Image.Resampling.BICUBIC)


def png(picture: Image.Image) -> bytes:
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    return encoded.getvalue()


def close(mine: str | None, theirs: Image.Image) -> bool:
    return bool(np.abs(np.asarray(picture_of(mine)).astype(int) - np.asarray(theirs)).max() <= 1)


def drawn(prepare: Any = None, **rest: Any) -> Image.Image:
    pipe = make_tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    if prepare is not None:
        prepare(pipe)
    handle = parallelize(pipe, window="full")
    try:
        return clear_dist.generate(pipe, "a red fox", num_inference_steps=4, seed=5, **SIZE | rest)[0]
    finally:
        handle.undo()


def test_image_to_image(server: Live, given: Image.Image) -> None:
    body = {"steps": 4, "seed": 5, "strength": 0.5}
    answer = server.client().images.edit(image=("a.png", png(given)), prompt="a red fox", size="96x64", extra_body=body)  # type: ignore[arg-type]
    assert answer.data is not None
    expected = drawn(image=given, strength=0.5)
    assert close(answer.data[0].b64_json, expected)
    assert not close(answer.data[0].b64_json, drawn())


def test_a_mask_keeps_what_is_black(server: Live, given: Image.Image) -> None:
    mask = Image.new("L", given.size, 0)
    mask.paste(255, (48, 0, 96, 64))
    files = {"image": png(given), "mask": png(mask)}
    body = {"steps": 4, "seed": 5, "strength": 0.9}
    answer = server.client().images.edit(prompt="a red fox", size="96x64", extra_body=body, **files)  # type: ignore[arg-type]
    assert answer.data is not None
    picture = np.asarray(picture_of(answer.data[0].b64_json))
    assert np.array_equal(picture[:, :48], np.asarray(given)[:, :48])
    assert close(answer.data[0].b64_json, drawn(image=given, mask_image=mask, strength=0.9))


def test_upscaling_is_one_of_its_uses(server: Live, given: Image.Image) -> None:
    """The prompt is one, whatever files have that name."""
    small = given.resize((72, 48))
    body = {"seed": 5, "use": "upscale", "strength": 0.3}
    answer = server.client().images.edit(
        image=("a.png", png(small)), prompt="pyproject.toml", size="128x80", extra_body=body
    )  # type: ignore[arg-type]
    assert answer.data is not None
    assert picture_of(answer.data[0].b64_json).size == (128, 80)
    with pytest.raises(openai.BadRequestError, match="larger"):
        server.client().images.edit(image=("a.png", png(given)), prompt="a", size="64x48", extra_body=body)


def bomb() -> bytes:
    return png(Image.new("1", (20_000, 20_000)))


WRONG: dict[str, Any] = {
    "no picture": (b"GIF89a", "image"),
    "a bomb": (bomb, "image"),
    "a script": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image"),
    "nothing": (b"", "image"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_picture_is_refused(server: Live, name: str) -> None:
    content, parameter = WRONG[name]
    content = content() if callable(content) else content
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().images.edit(image=("a.png", content), prompt="a", size="64x64")
    assert caught.value.param == parameter
    assert "/" not in str(caught.value)


def test_a_mask_must_fit(server: Live, given: Image.Image) -> None:
    for mask in (Image.new("L", (16, 16), 255), Image.new("L", given.size, 0)):
        with pytest.raises(openai.BadRequestError) as caught:
            server.client().images.edit(image=png(given), mask=png(mask), prompt="a", size="96x64")
        assert caught.value.param == "mask" and "/" not in str(caught.value)


def test_an_edit_may_be_a_job(server: Live, given: Image.Image) -> None:
    url, files = f"{server.url}/v1/images/edits?async=true", {"image": png(given)}
    answer = http.post(url, data={"prompt": "a red fox", "size": "96x64", "steps": "2"}, files=files)
    assert answer.status_code == 202
    assert job_in(server, answer.json()["id"], "succeeded")["images"]


def test_loras_are_switched(server: Live, folder: Path) -> None:
    """Each request has its own, also after one that has others, or a bad one."""
    plain, tensors = drawn(), [make_lora(make_tiny_pipeline().transformer, seed=seed) for seed in (0, 1)]
    first = drawn(lambda pipe: add_lora(pipe.transformer, tensors[0], 0.5))
    both = drawn(lambda pipe: [add_lora(pipe.transformer, each, 0.5) for each in tensors])

    def ask(*names: str) -> str | None:
        loras = [{"name": name, "weight": 0.5} for name in names]
        own = DRAWN | {"extra_body": DRAWN["extra_body"] | {"lora": loras}}
        answer = server.client().images.generate(**own)
        assert answer.data is not None
        return answer.data[0].b64_json

    for names, expected in ((("first",), first), ((), plain), (("first", "second"), both), (("first",), first)):
        assert close(ask(*names), expected), names
    for name in ("broken", "../model", "missing", "first.safetensors", "/etc/passwd"):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(name)
        assert str(folder) not in str(caught.value)
    assert close(ask("second", "first"), both)
    assert not close(ask(), both)
