"""Every row of BACKENDS against the oracle; a new row is covered by itself.

`triton` runs here only if Triton's interpreter is on: `test_triton.py` starts these tests once more with it."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clear_dist.attention import BACKENDS, choose_backend
from clear_dist.attention.backend import CallShape
from clear_dist.merge import merge
from tests.attention.calls import Case

NAMES = [name for name, backend in BACKENDS.items() if backend.why_not_here(CallShape("cpu", torch.float32)) is None]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
CASES = [
    Case(rows=16, key_rows=16, columns=16, text=4, radius=4),
    Case(rows=13, key_rows=13, columns=11, text=7, radius=4),
    Case(rows=40, key_rows=40, columns=37, text=33, radius=8),
    Case(rows=9, key_rows=23, columns=30, text=5, radius=8, row_offset=7, batch=2),
    Case(rows=9, key_rows=16, columns=19, text=5, radius=8, row_offset=0),
    Case(rows=9, key_rows=16, columns=19, text=5, radius=8, row_offset=7),
    Case(rows=1, key_rows=15, columns=33, text=3, radius=8, row_offset=7),
    Case(rows=1, key_rows=1, columns=1, text=0, radius=1),
    Case(rows=7, key_rows=7, columns=1, text=0, radius=3),
    Case(rows=1, key_rows=1, columns=50, text=130, radius=3),
    Case(rows=6, key_rows=6, columns=7, text=128, radius=40),
    Case(rows=20, key_rows=20, columns=20, text=0, radius=1),
    Case(rows=24, key_rows=60, columns=24, text=8, radius=5, row_offset=31),
    Case(rows=8, key_rows=8, columns=9, text=3, radius=3, scale=0.7),
    # The halo above, the one below, and keys that only the first or last rows of the queries see, or none.
    Case(rows=20, key_rows=7, columns=21, text=0, radius=8, row_offset=7),
    Case(rows=20, key_rows=7, columns=21, text=0, radius=8, row_offset=-20),
    Case(rows=3, key_rows=15, columns=10, text=0, radius=16, row_offset=-3, batch=2),
    Case(rows=30, key_rows=9, columns=12, text=0, radius=4, row_offset=-11),
    Case(rows=30, key_rows=9, columns=12, text=3, radius=4, row_offset=-11),
    Case(rows=9, key_rows=5, columns=12, text=0, radius=4, row_offset=8),
    Case(rows=9, key_rows=5, columns=12, text=2, radius=4, row_offset=400),
    Case(rows=9, key_rows=5, columns=12, text=0, radius=4, row_offset=-400),
    Case(rows=9, key_rows=0, columns=12, text=2, radius=4),
    Case(rows=9, key_rows=0, columns=12, text=0, radius=4),
]


def same_as_reference(name: str, case: Case) -> None:
    tensors = case.tensors()
    out, lse = case.run(name, tensors)
    assert (out.dtype, lse.dtype) == (case.dtype, torch.float32)
    assert (out.shape, lse.shape) == (tensors[0].shape, tensors[0].shape[:-1])
    expected_out, expected_lse = case.run("reference", tuple(tensor.float() for tensor in tensors))
    tolerance = {"atol": TOLERANCE[case.dtype], "rtol": TOLERANCE[case.dtype]}
    torch.testing.assert_close(out.float(), expected_out, **tolerance)
    torch.testing.assert_close(lse, expected_lse, **tolerance)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backend_is_the_reference(name: str, case: Case) -> None:
    same_as_reference(name, case)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_backend_in_half_precision(name: str, dtype: torch.dtype) -> None:
    same_as_reference(name, Case(rows=17, key_rows=30, columns=21, text=9, radius=6, row_offset=6, dtype=dtype))


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(deadline=None, max_examples=15)
def test_backend_on_any_geometry(name: str, data: st.DataObject) -> None:
    case = Case(
        rows=data.draw(st.integers(1, 28), "rows"),
        key_rows=data.draw(st.integers(0, 48), "rows of keys"),
        columns=data.draw(st.integers(1, 36), "columns"),
        text=data.draw(st.sampled_from([0, 1, 31, 129]), "text"),
        radius=data.draw(st.integers(1, 24), "radius"),
        row_offset=data.draw(st.integers(-60, 60), "row offset"),
        batch=data.draw(st.integers(1, 2), "batch"),
        heads=1,
    )
    same_as_reference(name, case)


@pytest.mark.parametrize("name", NAMES)
def test_stripes_with_halos_are_the_whole(name: str) -> None:
    whole = Case(rows=23, key_rows=23, columns=14, text=6, radius=5)
    query, key, value, *text = whole.tensors()
    out, lse = whole.run(name, (query, key, value, *text))
    for start, stop in pairwise([0, 1, 4, 15, 23]):
        first, last = max(0, start - 4), min(23, stop + 4)
        stripe = whole.run(
            name, (query[:, start:stop], key[:, first:last], value[:, first:last], *text), row_offset=start - first
        )
        torch.testing.assert_close(stripe, (out[:, start:stop], lse[:, start:stop]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ends", [[0, 11, 23], [0, 1, 2, 9, 23]], ids=str)
def test_keys_in_several_tensors_merge_to_the_whole(name: str, ends: list[int]) -> None:
    case = Case(rows=23, key_rows=23, columns=14, text=6, radius=5)
    query, key, value, *text = case.tensors()
    nothing = [tensor[:, :0] for tensor in text]
    parts = [case.run(name, (query, key[:, :0], value[:, :0], *text))]
    for start, stop in pairwise(ends):
        tensors = (query, key[:, start:stop], value[:, start:stop], *nothing)
        parts.append(case.run(name, tensors, row_offset=-start))
    assert any(lse.isneginf().any() for _, lse in parts)
    torch.testing.assert_close(merge(parts), case.run("reference", (query, key, value, *text)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("row_offset", [-8, 0, 9, 20, 29])
@pytest.mark.parametrize("text", [0, 4])
def test_rows_out_of_reach_are_not_read(name: str, row_offset: int, text: int) -> None:
    case = Case(rows=11, key_rows=40, columns=13, text=text, radius=6, row_offset=row_offset)
    query, key, value, *texts = case.tensors()
    expected = case.run("reference", (query, key, value, *texts))
    unread = torch.ones(40, dtype=torch.bool)
    unread[max(0, row_offset - 5) : row_offset + 11 + 5] = False
    assert unread.any()
    for tensor in (key, value):
        tensor[:, unread] = torch.nan
    torch.testing.assert_close(case.run(name, (query, key, value, *texts)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", [(0, 3, 1, 2, 4), (0, 1, 2, 4, 3), (4, 3, 2, 1, 0)], ids=str)
def test_any_strides_will_do(name: str, layout: tuple[int, ...]) -> None:
    case = Case(rows=10, key_rows=18, columns=12, text=3, radius=4, row_offset=5)
    tensors = case.tensors()
    inverse = sorted(range(5), key=layout.__getitem__)
    strided = tuple(tensor.permute(layout).contiguous().permute(inverse) for tensor in tensors[:3])
    torch.testing.assert_close(case.run(name, (*strided, *tensors[3:])), case.run(name, tensors), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("row_offset", [-4, 5])
@pytest.mark.parametrize("text", [0, 3])
def test_output_goes_where_it_may_or_to_memory_of_its_own(name: str, row_offset: int, text: int) -> None:
    case = Case(rows=10, key_rows=8, columns=12, text=text, radius=4, row_offset=row_offset)
    tensors = case.tensors()
    room = torch.full((12, 14, 1, 16, 2), torch.nan)
    wanted = room.permute(2, 0, 1, 4, 3)[:, 1:-1, 1:-1]
    out, lse = case.run(name, tensors, out_BRWND=wanted)
    torch.testing.assert_close((out, lse), case.run("reference", tensors), atol=1e-5, rtol=1e-5)
    there = out is wanted
    assert there or BACKENDS[name].extend is None  # who can extend can write there
    assert int(room.isnan().sum()) == room.numel() - wanted.numel() * there


@pytest.mark.parametrize("name", NAMES)
def test_no_queries_no_output(name: str) -> None:
    case = Case(rows=0, key_rows=3, columns=4, text=2, radius=2)
    out, lse = case.run(name, case.tensors())
    assert (out.shape, lse.shape) == ((1, 0, 4, 2, 16), (1, 0, 4, 2))


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_together_is_refused(name: str) -> None:
    case = Case(rows=4, key_rows=6, columns=4, text=2, radius=2)
    query, key, value, *text = tensors = case.tensors()
    with pytest.raises(ValueError, match="radius must be at least 1 token, got 0"):
        case.run(name, tensors, radius=0)
    with pytest.raises(ValueError, match=r"scale must be positive, got -0\.1; nearest: 0\.25"):
        case.run(name, tensors, scale=-0.1)
    with pytest.raises(ValueError, match="must be equal"):
        case.run(name, (query[:, :, :3], key, value, *text))
    with pytest.raises(ValueError, match=r"the output must be torch.float32 .*\[1, 4, 4, 2, 16\]"):
        case.run(name, tensors, out_BRWND=torch.empty(1, 4, 2, 4, 16))
    with pytest.raises(ValueError, match="their keys' shape"):
        case.run(name, (query, key, value[:, 1:], *text))


@pytest.mark.parametrize("name", NAMES)
def test_cpu_can_run_every_backend_when_asked(name: str) -> None:
    assert choose_backend(name, device="cpu", dtype=torch.float32).name == name
