"""A tiny model and a hub that has it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from diffusers import FluxPipeline

from tests.hub.server import Hub, serving
from tests.tiny import make_clear_weights, make_tiny_flux
from tests.tiny_lora import make_lora, save_lora


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_flux(tmp_path_factory.mktemp("hub"))
    transformer = FluxPipeline.from_pretrained(folder).transformer
    make_clear_weights(transformer, folder / "clear_local_2.safetensors")
    save_lora(make_lora(transformer, seed=1), folder / "style.safetensors")
    return folder


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def hub(folder: Path) -> Iterator[Hub]:
    with serving(folder) as running:
        yield running
