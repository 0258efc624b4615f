"""The page at `/` in a headless Chromium: a picture is asked for, watched, looked into, and removed."""

from collections.abc import Iterator
from pathlib import Path

import httpx2 as http
import pytest

from tests.serving.browser import CHROMIUM, browsing
from tests.serving.live import Live, living, tiny_model

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
FILLED = """
document.getElementById('prompt').value = 'a <b>red</b> fox';
document.getElementById('width').value = 96;
document.getElementById('height').value = 64;
document.getElementById('steps').value = 6;
document.getElementById('draw').click();
"""
SCROLLED = """
document.getElementById('viewer').dispatchEvent(new WheelEvent('wheel', {deltaY: -300, clientX: 800, clientY: 400}))
"""
PIXELS = """
(() => { const canvas = document.getElementById('viewer');
  const data = canvas.getContext('2d').getImageData(canvas.width / 2, canvas.height / 2, 1, 1).data;
  return data[3] === 255 && viewer.picture.url !== undefined; })()
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("here")
    with living(tiny_model(folder / "model"), folder) as server:
        yield server


@needs_browser
def test_a_picture_is_drawn_and_looked_into(server: Live, tmp_path: Path) -> None:
    with browsing(tmp_path) as page:
        page.open(server.url)
        page.until("document.getElementById('model').textContent !== ''")
        page.run(FILLED)
        page.until("document.querySelector('#jobs .state')?.textContent === '96x64'")
        page.until(PIXELS)
        assert page.run("document.querySelector('#jobs .text').textContent") == "a <b>red</b> fox"
        assert "seed" in page.run("document.getElementById('caption').textContent")
        before = page.run("viewer.scale")
        page.run(SCROLLED)
        page.until(f"viewer.scale > {1.2 * before}")
        assert [url for url in page.requested if not url.startswith((server.url, "blob:"))] == []
        page.run("document.querySelector('#jobs button').click()")
        page.until("document.getElementById('jobs').children.length === 0")


@needs_browser
def test_what_is_wrong_is_said(server: Live, tmp_path: Path) -> None:
    with browsing(tmp_path) as page:
        page.open(server.url)
        page.until("document.getElementById('model').textContent !== ''")
        page.run(FILLED.replace("= 96", "= 9600"))
        page.until("document.getElementById('message').textContent.includes('at most 128')")


def test_nothing_of_the_page_comes_from_elsewhere(server: Live) -> None:
    page = http.get(server.url)
    assert "default-src 'self'" in page.headers["Content-Security-Policy"]
    for part in ("page.js", "viewer.js", "page.css"):
        answer = http.get(f"{server.url}/page/{part}")
        assert answer.status_code == 200 and "http" not in page.text + answer.text
    for other in ("index.html", "..%2fapi.py", "%2e%2e/api.py", "api.py"):
        assert http.get(f"{server.url}/page/{other}").status_code == 404


def test_tiles_are_a_pyramid(server: Live) -> None:
    answer = server.client().images.generate(prompt="a", size="96x64", response_format="url", extra_body={"steps": 1})
    assert answer.data is not None
    url = answer.data[0].url
    assert http.get(f"{url}/tiles/0/0/0").headers["Content-Type"] == "image/jpeg"
    for tile in ("0/0/1", "1/0/0", "0/1/0"):
        assert http.get(f"{url}/tiles/{tile}").status_code == 404
