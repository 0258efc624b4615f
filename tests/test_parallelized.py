"""What ends with a pipeline on stripes."""

from collections.abc import Callable
from typing import Any
from weakref import ref

from clear_dist.comm.group import Group
from clear_dist.parallelized import Parallelized
from tests.engine.test_graphs import EXACT, STEPS, Recorder, on_stripes, stop
from tests.test_parallelize import run
from tests.tiny import make_tiny_pipeline


class Watched(Recorder):
    def __call__(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        replay, output = super().__call__(work)
        self.made = ref(replay)
        return replay, output


def test_no_graph_is_left_when_the_group_is_closed() -> None:
    """A stopped generation's goes, too: NCCL would wait for it for ever."""
    pipe, recorder = make_tiny_pipeline(), Watched()
    striped = on_stripes(pipe, Group.create("cpu"), EXACT, recorder)
    run(pipe, steps=STEPS, callback_on_step_end=stop)
    assert recorder.made() is not None
    Parallelized(striped, (), [striped.group], None, None).close()
    assert recorder.made() is None
