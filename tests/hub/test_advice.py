"""What a refusal says is nearest, or would help, is done, and helps."""

import shlex
import shutil
from pathlib import Path

from tests.hub.server import Hub, serving
from tests.hub.test_hub import INDEX, fetch, generate


def test_a_link_that_leads_to_nothing_is_no_file(hub: Hub, tmp_path: Path) -> None:
    """Somebody cleared the cache by hand; what is told helps."""
    tiny = ("someone/tiny", None, INDEX)
    fetch(hub.endpoint, tmp_path, tiny)
    (link,) = tmp_path.rglob("snapshots/*/transformer/*.safetensors")
    link.resolve().unlink()
    ((told, _),), errors = fetch(hub.endpoint, tmp_path, tiny, HF_HUB_OFFLINE="1")
    assert told == [
        "Failure",
        "cannot get someone/tiny from the hub (HF_HUB_OFFLINE is set): unset it, or pass local files (--model or --base "
        "FOLDER, --clear-weights FILE, --lora FILE)",
    ]
    assert errors == ""
    ((told, _),), _ = fetch(hub.endpoint, tmp_path, tiny)
    assert told is None
    assert link.is_file()


def test_the_advice_for_a_lora_of_another_name_helps(folder: Path, tmp_path: Path) -> None:
    """The repository holds CLEAR weights too, whose name is more like the one that was looked for."""
    (tmp_path / "hub").mkdir()
    shutil.copy(folder / "style.safetensors", tmp_path / "hub" / "My [v2] (best).safetensors")
    shutil.copy(folder / "clear_local_2.safetensors", tmp_path / "hub")
    given = ("--model", str(folder), "--clear-weights", "none")
    with serving(tmp_path / "hub") as hub:
        ended, errors = generate(hub, tmp_path / "home", *given, "--lora", "someone/tiny")
        told, _, advice = errors[-1].partition("; nearest: ")
        assert ended == 2
        assert told.endswith("someone/tiny on the hub must hold pytorch_lora_weights.safetensors, and does not")
        assert advice == "--lora 'someone/tiny:My [v2] (best).safetensors'"
        ended, errors = generate(hub, tmp_path / "home", *given, *shlex.split(advice))
        assert ended == 0, errors
