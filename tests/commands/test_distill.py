"""`clear-dist distill` from the command to the files, with a tiny pipeline; and what it refuses, in one line."""

import csv
import json
import shutil
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

from clear_dist.cli import main
from tests.forked import forked
from tests.tiny import make_tiny_flux

SIZE = 64
QUICK = ("--res", "64", "--window", "2", "--device", "cpu", "--max-sequence-length", "16", "--checkpointing-steps", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_flux(tmp_path_factory.mktemp("model"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "data", 3)
    return tmp_path


def write_pictures(folder: Path, count: int) -> None:
    folder.mkdir()
    for index in range(count):
        pixels = np.random.default_rng().integers(0, 256, (48, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        (folder / f"{index}.json").write_text(json.dumps({"prompt": f"a fox, number {index}"}))


def distill(model: Path, *arguments: str) -> int:
    with pytest.raises(SystemExit) as ending:
        main(["distill", "--model", str(model), "--data", "data", *QUICK, *arguments])
    return int(ending.value.code or 0)


def rows() -> list[dict[str, str]]:
    with Path("distilled/losses.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_a_run_its_files_and_how_it_goes_on(model: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.toml").write_text("window = 3\nlearning_rate = 1\nheld_out = 1\nvalidation_steps = 2\ndown_factor = 2\n")
    config = ("--config", "mine.toml", "--learning-rate", "0.001")
    assert distill(model, *config, "--steps", "2") == 0
    output = capsys.readouterr()
    assert output.out == "distilled/clear_local_2_down_2.safetensors\n"
    assert [row["step"] for row in rows()] == ["0", "1", "2"]
    assert float(rows()[2]["held_out"]) > 0 < float(rows()[2]["held_out_teacher"])
    assert "down_factor = 2\n" in Path("distilled/recipe.toml").read_text()
    with Image.open("distilled/samples/step_000002.png") as sheet:
        assert sheet.size == (SIZE, 2 * SIZE)
        teacher, student = (np.array(sheet)[rows] for rows in (slice(0, SIZE), slice(SIZE, None)))
    assert (teacher != student).any()
    shutil.copyfile("distilled/clear_local_2_down_2.safetensors", "first.safetensors")
    assert distill(model, *config, "--steps", "3") == 0
    assert "going on from distilled/checkpoint-2" in capsys.readouterr().err
    assert [row["step"] for row in rows()] == ["0", "1", "2", "3"]
    before, after = load_file("first.safetensors"), load_file("distilled/clear_local_2_down_2.safetensors")
    assert any((before[name] != x).any() for name, x in after.items())
    Path("distilled/clear_local_2_down_2.safetensors").unlink()  # as if killed between the checkpoint and its result
    assert distill(model, *config, "--steps", "3") == 0
    again = load_file("distilled/clear_local_2_down_2.safetensors")
    assert all(torch.equal(x, again[name]) for name, x in after.items())
    assert distill(model, *config, "--steps", "3", "--seed", "1") == 2
    assert (
        "checkpoint-3 is of another recipe, whose seed is 0, got 1; nearest: another --output"
        in capsys.readouterr().err
    )


def test_a_tar_on_two_ranks_and_caches_of_clear_s_own_code(model: Path, here: Path) -> None:
    with tarfile.open("data.tar", "w") as tar:
        for file in sorted(Path("data").iterdir()):
            tar.add(file, f"folder/{file.name}")
    command = ["distill", "--model", str(model), *QUICK, "--data", "data.tar", "--steps", "1", "--nproc", "2"]
    process = forked(partial(main, command))
    output = process.communicate()
    assert process.returncode == 0, output
    cached = load_file("distilled/cache/000000.safetensors")
    own = Path("own")
    own.mkdir()
    for index in range(2):
        mean, text = cached[f"{index:06}.mean"], cached[f"{index:06}.0"]
        save_file({"mean": mean, "std": torch.zeros_like(mean)}, own / f"{index}_latent_code.safetensors")
        both = {"caption_feature_t5": text, "caption_feature_clip": cached[f"{index:06}.1"]}
        save_file(both, own / f"{index}_prompt_embed.safetensors")
    assert distill(model, "--data", "own", "--steps", "1", "--output", "second") == 0
    again = load_file("second/cache/000000.safetensors")
    assert torch.equal(again["000001.0"], cached["000001.0"])
    assert not torch.equal(again["000001.mean"], cached["000001.mean"])  # shifted and scaled, as raw latents are
    assert (again["000001.std"].abs() < 1e-5).all()


def full(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def test_the_teacher_draws_its_own_pictures_once(
    model: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("prompts.txt").write_text("a red fox\ntwo dogs\n")
    command = ["distill", "--model", str(model), *QUICK, "--prompts", "prompts.txt", "--self-generate", "3"]

    def status(*arguments: str) -> int:
        with pytest.raises(SystemExit) as ending:
            main([*command, *arguments])
        return int(ending.value.code or 0)

    assert [status("--steps", steps) for steps in ("1", "2")] == [0, 0]
    texts = [json.loads(Path(f"distilled/pictures/00000{index}.json").read_text())["prompt"] for index in range(3)]
    assert texts == ["a red fox", "two dogs", "a red fox"]
    assert len({Path(f"distilled/pictures/00000{index}.png").read_bytes() for index in range(3)}) == 3
    Path("distilled/pictures").rename("pictures")
    shutil.rmtree("distilled")
    Path("distilled").mkdir()
    Path("pictures").rename("distilled/pictures")
    Path("prompts.txt").write_text("a red fox\nno dogs\n")
    capsys.readouterr()
    assert status("--steps", "1") == 2
    assert capsys.readouterr().err == (
        "clear-dist: the picture distilled/pictures/000001.png was drawn with prompt two dogs, got no dogs; "
        "nearest: another --output\n"
    )
    Path("distilled/pictures/000001.png").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "save", full)
        assert status("--steps", "1") == 1
    told = capsys.readouterr().err
    assert "the disk is full in distilled; what was written before stays, there is no checkpoint yet" in told
    assert "000001" not in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--down-factor", "3"), "--down-factor must divide the 4 tokens of a side, got 3; nearest: --res 48"),
        (
            ("--self-generate", "3"),
            "either --data or --self-generate says where pictures come from, got both; nearest: --data FOLDER",
        ),
        (("--data", "nowhere"), "--data must be a folder or a tar, got nowhere"),
        (("--config", "wrong.toml"), "wrong.toml has the unknown setting window_size; nearest: window"),
        (("--config", "text.toml"), "steps must be a whole number in text.toml, got 'many'; nearest: leave it out"),
        (("--teacher", "float8"), "--teacher float8 needs a CUDA GPU"),
        (
            ("--pattern", "swin", "--down-factor", "2"),
            "--down-factor must be 1 for --pattern swin, got 2; nearest: --pattern circle",
        ),
        (
            ("--pattern", "convolved", "--window", "3"),
            "--window must divide the 4 tokens of a side, got 3; nearest: --res 48",
        ),
        (
            ("--pattern", "linear"),
            "--window must be left out for --pattern linear, which has no size, got 2; nearest: --pattern circle",
        ),
        (("--held-out", "3"), "--held-out must leave samples to train on, got 3 of 3; nearest: 0"),
        (("--validation-prompts", "x.txt"), "--validation-prompts needs --validation-steps, got none; nearest: 500"),
        (
            ("--validation-steps", "1", "--validation-prompts", "nowhere"),
            "--validation-prompts must be a text file, one prompt a line, got nowhere (No such file or directory)",
        ),
        (("--data", "bare"), "each picture must have a caption, got 1 without, 0 first; nearest: NAME.txt"),
        (
            ("--data", "cut.tar"),
            "the tar cut.tar is cut off, damaged or compressed (unexpected end of data); nearest: ",
        ),
        (("--data", "short.tar"), "the tar short.tar is cut off after 2 files; nearest: download it again"),
        (("--data", "data/0.png"), "the tar data/0.png is cut off, damaged or compressed ("),
        (
            ("--optimizer", "prodigies"),
            "--optimizer must be one of adamw, adamw8bit, prodigy, got 'prodigies'; nearest: prodigy",
        ),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_loaded(
    model: Path, here: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], told: str
) -> None:
    Path("wrong.toml").write_text("window_size = 8\n")
    Path("text.toml").write_text('steps = "many"\n')
    Path("bare").mkdir()
    shutil.copyfile("data/0.png", "bare/0.png")
    with tarfile.open("whole.tar", "w") as tar:
        tar.add("data")
    with tarfile.open("whole.tar") as tar:
        ends = [member.offset_data + member.size for member in tar.getmembers()]
    Path("cut.tar").write_bytes(Path("whole.tar").read_bytes()[: ends[-1] - 1])
    Path("short.tar").write_bytes(Path("whole.tar").read_bytes()[: -(-ends[2] // 512) * 512])
    assert distill(model, *arguments) == 2
    assert told in (said := capsys.readouterr().err), said
    assert said.count("\n") == 1
    assert not Path("distilled").exists()


def test_broken_pictures_are_named_and_more_than_one_in_a_hundred_refused_until_they_are_whole(
    model: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Path("data/1.png").read_bytes()
    Path("data/1.png").write_bytes(whole[:500])
    assert distill(model, "--steps", "1") == 2
    said = capsys.readouterr().err
    assert "warning: the picture 1 cannot be read, and is left out" in said
    assert "at most 1 % of the pictures may be broken, got 1 of 3, 1 first" in said
    Path("data/1.png").write_bytes(whole)
    assert distill(model, "--steps", "1") == 0
    assert "1.mean" in " ".join(load_file("distilled/cache/000000.safetensors"))


def test_what_the_vae_lacks_is_no_broken_picture(
    model: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(*_: object) -> None:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(AutoencoderKL, "encode", encode)
    assert distill(model, "--steps", "1") == 1
    said = capsys.readouterr().err
    assert "can't allocate memory" in said and "cannot be read" not in said


def test_files_of_clear_s_own_code_that_cannot_be_used_are_named(
    model: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = Path("own")
    own.mkdir()
    for name, tensors in (("0_latent_code", ("mean", "std")), ("0_prompt_embed", ("caption_feature_t5",))):
        save_file({each: torch.zeros(1) for each in tensors}, own / f"{name}.safetensors")
    lacks = "0_prompt_embed.safetensors must have the tensor caption_feature_clip, got caption_feature_t5; nearest: "
    assert distill(model, "--data", "own") == 2
    assert f"clear-dist: {lacks}" in capsys.readouterr().err
    texts = own / "0_prompt_embed.safetensors"
    for name in ("0_latent_code.safetensors", texts.name):
        save_file({"caption_feature_t5": torch.zeros(1), "caption_feature_clip": torch.ones(1)}, texts)
        (own / name).write_bytes((own / name).read_bytes()[:-1])
        assert distill(model, "--data", "own", "--output", name) == 2
        assert f"clear-dist: {name} is cut off or damaged" in capsys.readouterr().err


def test_a_shard_that_is_cut_off_is_named(model: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert distill(model, "--steps", "1") == 0
    shard = Path("distilled/cache/000000.safetensors")
    shard.write_bytes(shard.read_bytes()[:-100])
    capsys.readouterr()
    assert distill(model, "--steps", "2") == 2
    assert f"the shard {shard} is cut off or damaged" in capsys.readouterr().err


def test_a_loss_that_is_no_number_and_a_full_disk_leave_the_last_checkpoint(
    model: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert distill(model, "--steps", "1") == 0
    good = Path("distilled/checkpoint-1/clear_local_2.safetensors").read_bytes()

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        assert distill(model, "--steps", "2") == 1
    said = capsys.readouterr().err
    assert (
        "the disk is full while distilled/checkpoint-2 was written; the last good checkpoint is distilled/checkpoint-1"
        in said
    )
    assert sorted(path.name for path in Path("distilled").glob("checkpoint*")) == ["checkpoint-1"]
    shard = Path("distilled/cache/000000.safetensors")
    save_file({name: torch.full_like(x, torch.nan) for name, x in load_file(shard).items()}, shard)
    assert distill(model, "--steps", "2") == 1
    said = capsys.readouterr().err
    assert "the loss is nan" in said
    assert "in step 2; the last good checkpoint is distilled/checkpoint-1" in said
    assert Path("distilled/checkpoint-1/clear_local_2.safetensors").read_bytes() == good
