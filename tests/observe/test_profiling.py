"""`--profile`: files of which steps, what is labelled in them and when it was, and that viewers can show all of it."""

import gzip
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from diffusers import FluxPipeline

from clear_dist.comm.group import Group
from clear_dist.observe.profiling import Profile, readable
from clear_dist.parallelize import parallelize
from tests.commands.test_generate import generate, start_on_ranks
from tests.ranks import run_ranks
from tests.test_parallelize import run
from tests.tiny import make_clear_weights, make_tiny_flux, make_tiny_pipeline

LAYERS, STEPS = 2, 3
"""The tiny model's, and those recorded."""
Slice = tuple[float, float]
"""Begin and end, in microseconds."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_flux(tmp_path_factory.mktemp("model"), sample_size=64)
    make_clear_weights(FluxPipeline.from_pretrained(folder).transformer, folder / "clear_local_2.safetensors")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def slices(trace: dict[str, Any], name: str) -> list[Slice]:
    """Slices of this name, or of it and a number, in order."""
    events = trace["traceEvents"]
    whole = [
        (event["ts"], event["ts"] + event["dur"]) for event in events if event["ph"] == "X" and is_one(event, name)
    ]
    begin = {event["id2"]["local"]: event["ts"] for event in events if event["ph"] == "b" and event["name"] == name}
    end = {event["id2"]["local"]: event["ts"] for event in events if event["ph"] == "e" and event["name"] == name}
    return sorted([*whole, *((begin[number], end[number]) for number in begin)])


def is_one(event: dict[str, Any], name: str) -> bool:
    return event["name"] == name or event["name"].rstrip("0123456789") == name


def inside(outer: Slice, found: list[Slice]) -> list[Slice]:
    return [(begin, end) for begin, end in found if outer[0] <= begin and end <= outer[1]]


def counts(trace: dict[str, Any]) -> Counter[str]:
    """Slices by label; layers and steps without their numbers."""
    names = (event["name"].rstrip("0123456789") for event in trace["traceEvents"] if event["ph"] == "X")
    return Counter(name for name in names if name.startswith(("layer ", "comm: ", "compute: ", "ProfilerStep#")))


def crossing(trace: dict[str, Any]) -> list[str]:
    """What begins in one slice of a thread and ends after it: Perfetto drops it."""
    threads: dict[tuple[int, int], list[tuple[float, float, str]]] = {}
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            found = (event["ts"], -event["dur"], event["name"])
            threads.setdefault((event["pid"], event["tid"]), []).append(found)
    dropped = []
    for thread in threads.values():
        around: list[float] = []
        for begin, minus_duration, name in sorted(thread):
            while around and around[-1] <= begin:
                around.pop()
            if around and begin - minus_duration > around[-1]:
                dropped.append(name)
            around.append(begin - minus_duration)
    return dropped


def profiled(model: Path, *arguments: str) -> list[dict[str, Any]]:
    """The traces of two ranks, of five steps."""
    process = start_on_ranks(model, "a fox", "--nproc", "2", "--steps", "5", "--profile", "trace.json", *arguments)
    output, errors = process.communicate()
    assert process.returncode == 0 and all("average (the paper's" in line for line in errors.splitlines()), errors
    assert "profile=trace.rank0.json ranks=2 steps=3\n" in output
    assert sorted(os.listdir()) == ["clear-dist.png", "trace.rank0.json", "trace.rank1.json"]
    return [json.loads(Path(f"trace.rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("text_attention", ["average", "exact"])
def test_sync_steps_show_messages_under_way_while_rows_attend_to_own_keys(
    model: Path, here: Path, text_attention: str
) -> None:
    traces = profiled(model, "--text-attention", text_attention, "--text-tokens", "replicated")
    reductions = 2 if text_attention == "exact" else 1  # the maximum, the sum
    for trace in traces:
        assert counts(trace) == {
            "ProfilerStep#": STEPS,
            "comm: agree": STEPS,
            "comm: agree wait": STEPS,
            "comm: join": STEPS,
            "layer ": 2 * STEPS * LAYERS,  # from projection to start, and attention
            "comm: halos start": STEPS * LAYERS,
            "comm: halos wait": STEPS * LAYERS,
            "comm: sends wait": STEPS * LAYERS,
            "comm: text start": STEPS * LAYERS * reductions,
            "comm: text wait": STEPS * LAYERS * reductions,
            "compute: text queries": STEPS * LAYERS,
            "compute: own keys": STEPS * LAYERS,
            "compute: halo keys": STEPS * LAYERS,
            "compute: merge": STEPS * LAYERS,
        }
        assert crossing(trace) == []
        starts, messages = slices(trace, "comm: halos start"), slices(trace, "gloo:recv")
        starting, attending = (slices(trace, "layer ")[part::2] for part in range(2))
        for first, layer, start, message in zip(starting, attending, starts, messages, strict=True):
            own, wait, halo = (
                inside(layer, slices(trace, name))[0]
                for name in ("compute: own keys", "comm: halos wait", "compute: halo keys")
            )
            assert (
                inside(first, [start]) == [start]
                and start[1] <= layer[0] <= own[0] < own[1] <= wait[0] < wait[1] <= halo[0]
            )
            assert inside(message, [own]) == [own]
    # One clock: nobody has the halos of a layer before the neighbour has begun to send them.
    for one, other in (traces, traces[::-1]):
        pairs = zip(slices(one, "comm: halos start"), slices(other, "comm: halos wait"), strict=True)
        assert all(start[0] < wait[1] for start, wait in pairs)


def test_a_share_of_the_text_is_under_way_while_the_image_is_projected(model: Path, here: Path) -> None:
    for trace in profiled(model, "--text-attention", "exact", "--text-tokens", "sharded"):
        found = counts(trace)
        assert found["layer "] == 3 * STEPS * LAYERS  # from projections to the start of text and of halos; attention
        for name in ("comm: text tokens start", "comm: text tokens wait", "comm: text start", "comm: text wait"):
            assert found[name] == STEPS * LAYERS  # the second goes in one message, for `exact` too
        assert crossing(trace) == []
        layers = slices(trace, "layer ")
        names = ("comm: text tokens start", "comm: halos start", "comm: text tokens wait", "compute: text queries")
        for double, single in zip(range(0, len(layers), 6), range(3, len(layers), 6), strict=True):
            for first, order in ((double, (0, 1, 2, 3)), (single, (1, 0, 2, 3))):
                whole = layers[first][0], layers[first + 2][1]
                begun = [inside(whole, slices(trace, name))[0][0] for name in names]
                assert sorted(order, key=begun.__getitem__) == list(order)


def test_stale_steps_show_messages_that_travel_for_a_step(model: Path, here: Path) -> None:
    traces = profiled(model, "--schedule", "stale", "--warmup-steps", "1")
    for rank, trace in enumerate(traces):
        found = counts(trace)
        for name in ("comm: halos start", "comm: text start", "compute: own keys", "compute: halo keys"):
            assert found[name] == STEPS * LAYERS
        assert found["layer "] == 2 * STEPS * LAYERS
        # After the last step what is on its way is waited for.
        assert found["comm: halos wait"] == found["comm: text wait"] == (STEPS + 1) * LAYERS
        assert crossing(trace) == []
        attending = slices(trace, "layer ")[1::2]
        # Nobody waits before the first layer's keys and values are there.
        answers = slices(trace, "comm: agree wait")
        assert [inside(layer, answers) for layer in attending[::LAYERS]] == [[answer] for answer in answers]
        for layer in attending:
            wait, halo, start = (
                inside(layer, slices(trace, name))[0]
                for name in ("comm: halos wait", "compute: halo keys", "comm: halos start")
            )
            assert wait[1] <= halo[0] < halo[1] <= start[0]
        messages = slices(trace, "gloo:recv")
        assert len(messages) == len(slices(trace, "gloo:send")) == STEPS * LAYERS
        assert all(len(inside(message, slices(trace, "comm: join"))) == 1 for message in messages)
        assert trace["distributedInfo"]["rank"] == rank
        names = {event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"}
        assert names == {f"rank {rank}"}
    processes = [{event["pid"] for event in trace["traceEvents"]} for trace in traces]
    assert not processes[0] & processes[1]
    assert traces[0]["baseTimeNanoseconds"] == traces[1]["baseTimeNanoseconds"]


def test_one_rank_records_the_last_stage_of_the_first_prompt(model: Path, here: Path) -> None:
    Path("prompts.txt").write_text("a fox\ntwo dogs\n")
    large = ("--prompts", "prompts.txt", "--res", "128", "--steps", "4", "--upscale-steps", "2")
    assert generate(model, *large, "--profile", "t.json.gz") == 0
    assert sorted(file.name for file in here.glob("t*")) == ["t.rank0.json.gz"]
    trace = json.loads(gzip.decompress(Path("t.rank0.json.gz").read_bytes()))
    assert [counts(trace)[name] for name in ("ProfilerStep#", "layer ", "compute: own keys")] == [2, 8, 4]
    assert counts(trace)["compute: halo keys"] == 0
    assert crossing(trace) == []


def interrupted(group: Group, file: Path, steps: int) -> None:
    """On a rank: an error in the second of `steps` steps, while messages are on their way."""
    pipe = make_tiny_pipeline()
    parallelized = parallelize(pipe, group=group, window=4, schedule="stale", warmup_steps=0)
    profile = Profile(file, group.rank, steps=steps, drain=parallelized.drain)
    done = []

    def after_step(*_: object) -> dict[str, Any]:
        profile.after_step()
        done.append(True)
        if len(done) == 2:
            raise ZeroDivisionError
        return {}

    with pytest.raises(ZeroDivisionError), profile.recording():
        run(pipe, steps=steps, callback_on_step_end=after_step)
    parallelized.undo()


def test_a_failure_while_steps_are_recorded_leaves_nothing(tmp_path: Path) -> None:
    run_ranks(interrupted, 2, tmp_path / "trace.json", 3)
    assert os.listdir(tmp_path) == []


def test_ranks_and_their_gpus_are_told_apart() -> None:
    def on(process: int | str, name: str, **more: Any) -> dict[str, Any]:
        return {"ph": "X", "name": name, "pid": process, "tid": 1, "ts": 5.0, "dur": 2.0, "args": {}} | more

    def trace() -> dict[str, Any]:
        named = on(0, "process_name", ph="M", args={"name": "python"})
        return {"schemaVersion": 1, "traceEvents": [on(77, "aten::mm"), on(0, "gemm"), named, on("Spans", "all")]}

    first, second = (readable(trace(), rank)["traceEvents"] for rank in (0, 1))
    assert [event["pid"] for event in first + second] == [0, 1, 1, 100, 101, 101]
    assert second[2]["args"] == {"name": "rank 1"}
    posted, waited_for = readable({"traceEvents": [on(77, "gloo:send")]}, 0)["traceEvents"]
    assert (posted["ph"], posted["ts"], waited_for["ph"], waited_for["ts"]) == ("b", 5.0, "e", 7.0)
    assert posted["id2"] == waited_for["id2"]
