"""Names of results before anything is loaded: symlinks, which are written through."""

from pathlib import Path

import pytest

from clear_dist.families.cards import CARDS
from clear_dist.launch.env import Place
from clear_dist.options import Refusal
from clear_dist.request.flags import GenerateFlags
from clear_dist.request.settle import settle

ENDINGS = {"output": ".png", "latents_out": ".safetensors", "report": ".json", "profile": ".rank0.json"}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nowhere/x{}", "must lie in a folder that exists"),
        ("/dev/null", "must be a file, got .*, which is none"),
        ("link{}", "must be a file that can be written"),
    ],
    ids=["missing", "device", "loop"],
)
@pytest.mark.parametrize("flag", ENDINGS)
def test_symlinks_that_cannot_be_written_through_are_refused(
    tmp_path: Path, flag: str, target: str, message: str
) -> None:
    (tmp_path / f"link{ENDINGS[flag]}").symlink_to(target.format(ENDINGS[flag]))
    given = tmp_path / f"link{ENDINGS[flag].removeprefix('.rank0')}"
    with pytest.raises(Refusal, match=message):
        settle(GenerateFlags(model="demo", device="cpu", **{flag: given}), Place(), CARDS)


def test_a_symlink_to_another_result_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").symlink_to("a.safetensors")
    files = {"report": tmp_path / "a.json", "latents_out": tmp_path / "a.safetensors"}
    with pytest.raises(Refusal, match="must be different files"):
        settle(GenerateFlags(model="demo", device="cpu", **files), Place(), CARDS)
