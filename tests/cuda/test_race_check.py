"""The race check itself, on logs written by hand."""

import pytest

from tests.cuda.races import check

WRITE = "# op aten::add stream 0 R  W 4096,512"
SEND = "nccl send comm 0x10 stream 0x20 peer 1 R 0x1000 256 W (nil) 0"
ORDER = ["record event 0x30 stream (nil)", "wait stream 0x20 event 0x30"]


@pytest.mark.parametrize(
    ("lines", "races"),
    [
        ([WRITE, *ORDER, SEND], 0),
        ([WRITE, SEND], 1),
        ([*ORDER, WRITE, SEND], 1),  # recorded before
        ([WRITE, "streamsync (nil)", SEND], 0),
        ([WRITE, *ORDER, SEND, WRITE], 1),  # overwritten while it leaves
        ([WRITE.replace("4096", "8192"), SEND], 0),  # elsewhere
        ([SEND, SEND.replace("0x20", "0x40")], 0),  # two readers
    ],
)
def test_two_streams_race_where_no_event_orders_them(lines: list[str], races: int) -> None:
    assert check(lines).races.total() == races
