"""`clear-dist distill` with a model of the hub, whose size is known once its files are here."""

from functools import partial
from pathlib import Path

from clear_dist.cli import main
from tests.hub.server import Hub
from tests.hub.test_hub import ask


def test_what_does_not_divide_the_grid_is_refused_before_weights_are_loaded(hub: Hub, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "0.png").write_bytes(b"")
    (data / "0.txt").write_text("a fox")
    command = ["distill", "--model", "someone/tiny", "--data", str(data), "--device", "cpu", "--down-factor", "5"]
    status, _, errors = ask(partial(main, command), hub.endpoint, tmp_path / "home")
    assert status == 2
    assert "--down-factor must divide the 8 tokens of a side, got 5; nearest: --res 80" in errors.splitlines()[-1]
    assert not Path("distilled").exists()
