"""Pictures that are gone on with, stage by stage and step by step, against undisturbed ones on as many ranks."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clear_dist.comm.group import Group
from clear_dist.drawing.cascade import Cascade
from clear_dist.drawing.checkpoints import CheckpointFolder
from clear_dist.drawing.resume import Checkpoints, Running
from clear_dist.engine.striped import require_striped
from clear_dist.stages import Sampling, Stage, Upscaling, plan_cascade
from tests.ranks import run_ranks
from tests.refining.drawing import SEED, cascade_of, relative_error
from tests.refining.reference import NATIVE
from tests.tiny import make_tiny_pipeline

Drawn = list[tuple[Tensor | None, Tensor | None]]
WAYS = ("sdedit", "hiflow", "imax")
GUIDED = {"negative": "fog", "guidance_ranks": 2}


class Stopped(Exception):
    """A test's kill, on all ranks at once."""


class Stopping(Checkpoints):
    where = (0, 0)

    def end_step(self, running: Running, done: int, latents: Tensor) -> Tensor:
        latents = super().end_step(running, done, latents)
        if (running.number, done) == self.where:
            raise Stopped
        return latents


def stages_of(way: str, *, guided: bool = False, steps: int = 6) -> tuple[Stage, ...]:
    """64 px, then 128 px."""
    scale = 3.0 if guided else 1.0
    upscaling = replace(Upscaling().above(steps, way), true_cfg_scale=scale)
    sampling = Sampling(steps=steps, true_cfg_scale=scale)
    return plan_cascade((2 * NATIVE, 2 * NATIVE), native=NATIVE, token=16, sampling=sampling, upscaling=upscaling)


@contextmanager
def counted(pipe: Any) -> Iterator[list[int]]:
    """Forwards that are computed: those of the first block."""
    calls: list[int] = []
    hook = pipe.transformer.transformer_blocks[0].register_forward_hook(lambda *_: calls.append(1))
    yield calls
    hook.remove()


class Drawer:
    """A pipeline on stripes."""

    def __init__(self, group: Group, *, negative: str | None = None, **options: Any) -> None:
        self.pipe, self.group = make_tiny_pipeline(sample_size=NATIVE), group
        self.first, _ = cascade_of(self.pipe, group, negative=negative, window=3, text_attention="exact", **options)

    def drawn(self, stages: tuple[Stage, ...], checkpoints: Checkpoints | None = None) -> Drawn:
        cascade = Cascade(self.pipe, self.first._embeddings, seed=SEED, checkpoints=checkpoints)
        return [(each.latents, each.pixels) for each in cascade.run(stages)]

    def stopped(self, stages: tuple[Stage, ...], folder: Path, where: tuple[int, int], every: int = 2) -> None:
        checkpoints = Stopping(CheckpointFolder(folder, "request"), self.group, every)
        checkpoints.where = where
        with pytest.raises(Stopped):
            self.drawn(stages, checkpoints)

    def gone_on(self, stages: tuple[Stage, ...], folder: Path) -> tuple[Drawn, Checkpoints, int]:
        """Stages that were left, where they began, and forwards of this rank."""
        checkpoints = Checkpoints(CheckpointFolder(folder, "request"), self.group, 2)
        with counted(self.pipe) as calls:
            return self.drawn(stages, checkpoints), checkpoints, len(calls)


def same(drawn: Drawn, whole: Drawn) -> bool:
    pairs = zip(drawn[-1], whole[-1], strict=True)
    return all((x is None and y is None) or torch.equal(x, y) for x, y in pairs)


def everywhere(group: Group, folder: Path, places: list[tuple[int, int]], guided: bool) -> list[tuple[Any, ...]]:
    """For each way and place: where it went on, whether it drew the same, and forwards per step."""
    found = []
    drawer = Drawer(group, **(GUIDED if guided else {}))
    for way in WAYS:
        stages = stages_of(way, guided=guided)
        whole = drawer.drawn(stages)
        for where in places:
            here = folder / f"{way}-{where}"
            if group.rank == 0:
                here.mkdir()
            group.barrier()
            drawer.stopped(stages, here, where)
            drawn, checkpoints, forwards = drawer.gone_on(stages, here)
            found.append((way, where, (checkpoints.stage, checkpoints.step), same(drawn, whole), forwards))
    return found


def random_places(ranks: int) -> list[tuple[int, int]]:
    """A step of the first stage, one of the second, and on one rank the last one before a picture is decoded."""
    return [(0, random.randint(1, 5)), (1, random.randint(1, 3)), (0, 6)][: 3 if ranks == 1 else 2]


@pytest.mark.parametrize(("ranks", "guided"), [(1, False), (3, False), (2, True)])
def test_a_picture_that_is_gone_on_with_is_the_undisturbed_one(tmp_path: Path, ranks: int, guided: bool) -> None:
    steps = {"sdedit": (6, 4), "hiflow": (6, 3), "imax": (6, 6)}
    for rank in run_ranks(everywhere, ranks, tmp_path, random_places(ranks), guided):
        for way, (stage, step), went_on, is_same, forwards in rank:
            before = step if step == steps[way][stage] else step // 2 * 2
            assert went_on == (stage, before), way
            assert is_same, (way, stage, step)
            if not guided:  # the first forward of a stage, with I-Max on both grids, tells what the others look like
                again = min(before, 2 if (way, stage) == ("imax", 1) else 1)
                left = sum(steps[way][stage:]) - before + again
                assert forwards == left, (way, stage, step)


def with_caches(group: Group, folder: Path, place: int) -> list[tuple[bool, list[list[int]]]]:
    """For each cache whether it drew the same, and the steps left out by an undisturbed one and this one."""
    found, stages = [], stages_of("sdedit", guided=True, steps=12)[:1]
    for cache in ("first-block:0.9", "taylor:3"):
        drawer = Drawer(group, cache=cache, **GUIDED)
        whole, skipped = drawer.drawn(stages), [require_striped(drawer.pipe).cache.skipped]
        here = folder / cache
        if group.rank == 0:
            here.mkdir()
        group.barrier()
        drawer.stopped(stages, here, (0, place), every=1)
        drawn, checkpoints, _ = drawer.gone_on(stages, here)
        assert (checkpoints.stage, checkpoints.step) == (0, place)
        found.append((same(drawn, whole), [*skipped, require_striped(drawer.pipe).cache.skipped]))
    return found


def test_what_step_caches_hold_is_kept(tmp_path: Path) -> None:
    """On two ranks, each with a pass of guidance, and so a cache, of its own."""
    place = random.randint(4, 8)
    for rank in run_ranks(with_caches, 2, tmp_path, place):
        for is_same, (skipped, again) in rank:
            assert is_same and again == skipped, (place, skipped, again)
            assert any(step < place for step in skipped) and any(step >= place for step in skipped)


def begun(group: Group, folder: Path, place: tuple[int, int], way: str) -> None:
    Drawer(group).stopped(stages_of(way), folder, place)


def ended(group: Group, folder: Path, way: str) -> tuple[Tensor, tuple[int, int]]:
    drawn, checkpoints, _ = Drawer(group).gone_on(stages_of(way), folder)
    assert drawn[-1][0] is not None
    return drawn[-1][0], (checkpoints.stage, checkpoints.step)


def undisturbed(group: Group, way: str) -> Tensor:
    latents = Drawer(group).drawn(stages_of(way))[-1][0]
    assert latents is not None
    return latents


@pytest.mark.parametrize("way", ["sdedit", "hiflow"])
def test_another_number_of_ranks_goes_on(tmp_path: Path, way: str) -> None:
    (expected,) = run_ranks(undisturbed, 1, way)
    for ranks, others, place in ((2, 3, (1, 2)), (3, 1, (0, 5))):
        folder = tmp_path / f"{ranks}"
        folder.mkdir()
        run_ranks(begun, ranks, folder, place, way)
        for latents, went_on in run_ranks(ended, others, folder, way):
            assert went_on == (place[0], place[1] // 2 * 2)
            assert 0 < relative_error(latents, expected) < 1e-4 or torch.equal(latents, expected)


def test_a_damaged_checkpoint_is_told_of_and_the_one_before_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawer, stages = Drawer(Group.create("cpu")), stages_of("sdedit")
    whole = drawer.drawn(stages)
    for number, (damage, place, went_on) in enumerate(
        [(cut, (0, 5), (0, 2)), (changed, (1, 4), (1, 2)), (emptied, (1, 3), (1, 0)), (changed, (1, 1), (0, 6))]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        drawer.stopped(stages, folder, place)
        newest = max(folder.iterdir(), key=lambda file: file.name)
        damage(newest)
        capsys.readouterr()
        drawn, checkpoints, _ = drawer.gone_on(stages, folder)
        assert f"the checkpoint {newest} is damaged; going on from the one before" in capsys.readouterr().err
        assert (checkpoints.stage, checkpoints.step) == went_on
        assert same(drawn, whole)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def changed(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def test_two_checkpoints_are_kept_with_what_their_stages_began_with(tmp_path: Path) -> None:
    drawer = Drawer(Group.create("cpu"))
    drawer.stopped(stages_of("sdedit"), tmp_path, (1, 3), every=1)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == [f"stage-2-step-{step}.safetensors" for step in (0, 2, 3)]


def test_a_disk_that_is_full_loses_nothing_but_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    drawer, stages = Drawer(Group.create("cpu")), stages_of("sdedit")
    whole = drawer.drawn(stages)
    monkeypatch.setattr("clear_dist.drawing.checkpoints.save_file", fail)
    drawn, _, _ = drawer.gone_on(stages, tmp_path)
    assert same(drawn, whole)
    assert "warning: no checkpoint: OSError: [Errno 28] No space left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
