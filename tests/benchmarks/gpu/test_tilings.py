"""The table of tilings once a GPU has timed some."""

from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks.gpu import tilings

OLD, FAST, SLOW = ({"queries": [8, 8], "keys": [4, width], "warps": 4, "stages": 2} for width in (4, 8, 16))


def timed(architecture: int, tiling: Any, seconds: float) -> dict[str, Any]:
    return {"architecture": architecture, "key_bytes": 256, "tiling": tiling, "seconds": seconds}


def test_the_fastest_takes_its_place_and_all_others_stay() -> None:
    table = {"measured": False, "tilings": {"80": {"128": OLD, "256": OLD}, "90": {"128": OLD, "256": OLD}}}
    failed = {"architecture": 90, "key_bytes": 256, "tiling": OLD, "note": "too much shared memory"}
    rows = [timed(90, SLOW, 2.0), timed(90, FAST, 1.0), timed(87, FAST, 3.0), failed, {"seconds": 0.1}]
    assert tilings.with_measured(table, rows) == {
        "measured": ["sm_87, 256 bytes", "sm_90, 256 bytes"],
        "tilings": {
            "80": {"128": OLD, "256": OLD},
            "87": {"128": OLD, "256": FAST},
            "90": {"128": OLD, "256": FAST},
        },
    }
