"""What a script is told that puts a pipeline on stripes."""

import warnings

from clear_dist.comm.group import Group
from clear_dist.parallelize import parallelize
from tests.ranks import run_ranks
from tests.tiny import make_tiny_pipeline


def warned_of(group: Group) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for chosen in ({"window": 4}, {"window": 4, "text_attention": "exact"}, {}):
            parallelize(make_tiny_pipeline(), **chosen).undo()
    return [str(each.message) for each in caught if "ranks draw" in str(each.message)]


def test_average_on_several_ranks_is_said_once() -> None:
    """Where no group is given, as in a user's script."""
    first, second = run_ranks(warned_of, 2)
    assert len(first) == 1 and first[0].endswith("; text_attention exact draws the same")
    assert second == []
