"""Each check can fail: something faulty is put in the place of what it verifies, and the check names it."""

from typing import Any

import pytest

from clear_dist.comm.group import Group
from clear_dist.verify import CHECKS, Result, Subjects, run_checks
from clear_dist.verify.environment import differences
from tests.ranks import RanksFailedError, run_ranks
from tests.verify import faults


def run_one(group: Group, check: str, subjects: Subjects) -> list[Result]:
    return run_checks(group, subjects, lambda _: None, {check: CHECKS[check]})


def run_all_through_host_memory(group: Group) -> list[Result]:
    return run_checks(Group.create("cpu", transport="host"), Subjects(), lambda _: None)


def failed_checks(check: str, ranks: int, **faulty: Any) -> dict[str, list[str]]:
    """The faults of the checks that did not pass, which all ranks must agree on."""
    found = [
        {result.name: result.faults for result in results if not result.passed}
        for results in run_ranks(run_one, ranks, check, Subjects(**faulty))
    ]
    assert all(theirs == found[0] for theirs in found)
    return found[0]


@pytest.mark.parametrize("check", [name for name in CHECKS if name != "links"])
def test_nothing_is_found_where_nothing_is_wrong(check: str) -> None:
    assert failed_checks(check, 3) == {}


def test_ranks_that_share_a_gpu_pass_too() -> None:
    for results in run_ranks(run_all_through_host_memory, 2):
        assert all(result.passed for result in results)
        assert results[0].findings[0].details["transport"] == "host"


def test_rows_in_the_wrong_order_are_found_and_named() -> None:
    found = failed_checks("halos", 3, exchange=faults.RowsInWrongOrder)
    # Rank 1 has the rows 3 and 4; a halo of one row cannot be out of order.
    assert set(found) == {
        f"halos, {window}, {dtype}"
        for window in ("radius 8", "radius 32", "full attention")
        for dtype in ("float32", "bfloat16")
    }
    for (line,) in found.values():
        assert line.startswith("rank 1: exchange 1: keys of row 0, which is rank 0's: row 2, must be 0")


def test_what_was_never_written_is_found() -> None:
    found = failed_checks("halos", 2, exchange=faults.NothingWritten)
    assert len(found) == 8
    assert all(line.startswith("rank 0: ") and "owner nan, must be 1" in line for (line,) in found.values())


@pytest.mark.parametrize(
    ("exchange", "words"),
    [
        (faults.RowsOfTheExchangeBefore, "exchange 2: keys of row 0, which is rank 0's: exchange 0, must be 2"),
        (faults.OneRowTooFew, "the halo must be [2, 2, 3, 5, 2, 6], got [2, 2, 2, 5, 2, 6]"),
    ],
)
def test_late_and_missing_rows_are_found(exchange: Any, words: str) -> None:
    found = failed_checks("halos", 2, exchange=exchange)
    assert any(words in line for line in found["halos, radius 8, float32"])


def test_a_check_that_raises_is_named() -> None:
    with pytest.raises(RanksFailedError, match="in the check of halos: ZeroDivisionError: by nothing"):
        run_ranks(run_one, 2, "halos", Subjects(exchange=faults.RaisesInAnExchange))


def test_wrong_reductions_are_found() -> None:
    dtypes = ("float32", "bfloat16")
    exact, average = ({f"text reduction, {mode}, {dtype}" for dtype in dtypes} for mode in ("exact", "average"))
    assert set(failed_checks("text reduction", 2, reduction=faults.averages_always)) == exact
    assert set(failed_checks("text reduction", 2, reduction=faults.ForgetsToWeigh)) == exact
    assert set(failed_checks("text reduction", 2, reduction=faults.Sums)) == average


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (faults.rubbish, "output of Case("),
        (faults.wider_circle, "output of Case("),
        (faults.wrong_log_sum_exp, "log-sum-exp of Case("),
        (faults.not_a_number, "is off by nan"),
        (faults.cannot_be_launched, "raised RuntimeError: no kernel image is available for execution"),
    ],
)
def test_backends_that_give_rubbish_are_found(run: Any, words: str) -> None:
    found = failed_checks("attention", 1, backends=faults.with_backend("flex", run))
    assert "attention, flex, float32" in found
    assert set(found) <= {"attention, flex, float32", "attention, flex, bfloat16"}
    assert words in found["attention, flex, float32"][0]


def test_the_reference_is_not_believed_either() -> None:
    found = failed_checks("attention", 1, backends=faults.with_backend("reference", faults.wider_circle))
    assert {"attention, reference, float32", "attention, reference, bfloat16"} <= set(found)


def test_a_model_that_depends_on_the_number_of_ranks_is_found() -> None:
    found = failed_checks("tiny FLUX", 3, parallelize=faults.parallelize_with_average)
    exact = {f"tiny FLUX, exact, 3 ranks against one, {dtype}" for dtype in ("float32", "bfloat16")}
    assert set(found) == exact | {"tiny FLUX, exact, 3 ranks by columns against one"}
    assert len(found["tiny FLUX, exact, 3 ranks against one, float32"]) == 3


def test_a_warm_up_that_is_not_synchronous_is_found() -> None:
    found = failed_checks("tiny FLUX", 2, parallelize=faults.parallelize_without_warmup)
    assert set(found) == {"tiny FLUX, stale in warm-up against sync"}


def test_full_attention_that_is_not_diffusers_is_found() -> None:
    found = failed_checks("tiny FLUX", 2, parallelize=faults.parallelize_with_a_window)
    assert set(found) == {"tiny FLUX, full attention, 2 ranks against diffusers"}


def test_messages_that_arrive_changed_are_found() -> None:
    found = failed_checks("links", 3, post=faults.post_something_else)
    assert len(found) == 6
    assert all(name.startswith("neighbours, ") for name in found)
    for lines in found.values():
        assert lines == [f"rank {rank}: 100 numbers from rank 1 are wrong" for rank in (0, 2)]


def test_messages_that_would_take_too_long_are_left_out() -> None:
    results = run_ranks(run_one, 2, "links", Subjects(post=faults.post_slowly))[0]
    assert [result.name for result in results if result.name.startswith("neighbours")] == [
        "neighbours, 1 kB",
        "neighbours, 64 kB",
        "neighbours, 1 MB",
    ]
    assert results[2].findings[0].figure.endswith(" between ranks 0 and 1; 11.8 MB would take too long")
    assert 0 < results[2].findings[0].details["gigabytes_per_second"] < 0.0051


def test_an_all_reduce_that_does_not_divide_is_found() -> None:
    found = failed_checks("links", 2, reduction=faults.Sums, post=faults.post)
    off = [f"rank {rank}: off by 1 of the mean" for rank in (0, 1)]
    families = "FLUX", "FLUX.2", "SD3", "Z-Image"
    assert found == {f"all-reduce of {family}'s text, average": off for family in families}


def test_other_versions_on_another_rank_are_found() -> None:
    first = {"versions": {"torch": "2.13", "triton": "3.7"}}
    other = {"versions": {"torch": "2.12"}}
    assert differences([first, first], 1) == []
    assert differences([first, other], 1) == ["torch 2.12 here, 2.13 on rank 0", "triton missing here, 3.7 on rank 0"]
