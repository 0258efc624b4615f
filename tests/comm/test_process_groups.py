"""What is set before NCCL makes its first communicator."""

import os
from datetime import timedelta

import pytest

from clear_dist.comm import process_groups
from clear_dist.comm.group import Group


@pytest.mark.parametrize("set_by_user", [None, "0"])
def test_communicators_start_in_the_order_of_the_host_unless_the_user_wants_another(
    set_by_user: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_LAUNCH_ORDER_IMPLICIT", set_by_user or "")  # so that what is set here is taken back
    if set_by_user is None:
        monkeypatch.delenv("NCCL_LAUNCH_ORDER_IMPLICIT")
    group = Group.create("cpu")
    assert os.environ.get("NCCL_LAUNCH_ORDER_IMPLICIT") == set_by_user
    process_groups.new_process_group([(0,)], "cpu:gloo,cuda:nccl", timedelta(seconds=1))
    assert os.environ["NCCL_LAUNCH_ORDER_IMPLICIT"] == (set_by_user or "1")
    group.close()
