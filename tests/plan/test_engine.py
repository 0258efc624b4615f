"""What `plan` knows of the engine without importing it is what the engine says of itself."""

from dataclasses import replace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clear_dist.attention import BACKENDS, choose_backend, dense, flex, masked, tiled
from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.engine import parts, room
from clear_dist.engine.cut import largest_call
from clear_dist.geometry import cut_in_stripes, plan_halos, plan_pooled
from clear_dist.plan import choice, kernels, memory, step, traffic, vae
from clear_dist.plan.request import parts_of
from clear_dist.stages import Sampling
from clear_dist.vae import MAX_BYTES, decode_stripes, stripe_ops
from tests.plan.sizes import FLUX, flux_request
from tests.plan.test_memory import requested, tiny
from tests.ranks import run_ranks


def test_constants_are_the_engines() -> None:
    assert step.MOST_TOKENS == parts.MOST_TOKENS
    assert vae.MAX_BYTES == MAX_BYTES
    assert vae.BYTES_PER_VALUE == stripe_ops.BYTES_PER_VALUE
    assert memory.SENDING_LAYERS == room.SENDING_LAYERS
    assert kernels.TILE == (flex.TILE_ROWS, flex.TILE_COLUMNS)
    tilings = {"cpu": tiled.CPU_TILING, "cuda": tiled.GPU_TILING}
    assert {name: (tiling.side, tiling.bytes_per_call) for name, tiling in tilings.items()} == kernels.TILINGS
    assert kernels.KERNELS.keys() == BACKENDS.keys()
    assert (kernels.MASK_ALIGNMENT, kernels.MASKS_KEPT) == (dense.BIAS_ALIGNMENT, masked.MASKS_KEPT)


@given(
    rows=st.integers(1, 140),
    columns=st.integers(1, 140),
    ranks=st.integers(1, 9),
    radius=st.integers(1, 60),
    text=st.integers(1, 600),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    head_dim=st.sampled_from([32, 64, 128]),
)
@settings(deadline=None, max_examples=200)
def test_auto_takes_the_backend_that_the_engine_takes(
    rows: int, columns: int, ranks: int, radius: int, text: int, dtype: torch.dtype, head_dim: int
) -> None:
    """On a CPU, where some were measured."""
    request = flux_request(
        model=replace(FLUX, head_dim=head_dim),
        gpu=None,
        height=16 * rows,
        width=16 * columns,
        ranks=min(ranks, rows),
        window=radius,
        text_tokens=text,
        dtype=str(dtype)[6:],
        cascade=False,
    )
    parts_of_ranks = parts_of(request, request.stages[0])
    planned = {choice.backend_of(request, part) for part in parts_of_ranks}
    call = largest_call((rows, columns), cut_in_stripes(rows, request.ranks), parts_of_ranks[0].radius)
    assert planned == {choose_backend("auto", device="cpu", dtype=dtype, head_dim=head_dim, text=text, **call).name}


@given(units=st.integers(2, 40), ranks=st.integers(2, 9), radius=st.integers(1, 40), factor=st.sampled_from([1, 2, 4]))
@settings(deadline=None, max_examples=30)
def test_stale_buffers_are_those_that_are_refused_without_room(
    units: int, ranks: int, radius: int, factor: int
) -> None:
    """engine/room.py counts them before they are made."""
    ranks, rows = min(ranks, units), units * factor
    request = flux_request(
        down_factor=factor,
        height=16 * rows,
        width=16 * 100,
        ranks=ranks,
        window=radius,
        schedule="stale",
        warmup_steps=1,
        cascade=False,
        sampling=Sampling(true_cfg_scale=2.0),
    )
    row_bytes = 2 * 100 * 3072 * 2
    stripes = cut_in_stripes(rows, ranks, unit=factor)
    for rank, part in enumerate(parts_of(request, request.stages[0])):
        plans = [(plan_halos(stripes, rank, part.radius), row_bytes)]
        if factor > 1:
            plans.append((plan_pooled(stripes, rank, factor), row_bytes // factor))
        planned = memory.exchanged(memory.step_of(request, request.stages[0], part))
        received = sum(room.halo_bytes_kept(plan, row_bytes=size, layers=2 * 57) for plan, size in plans)
        assert planned["stale halos"] == received
        assert planned["halos on their way"] == sum(
            room.halo_bytes_in_flight(plan, row_bytes=size) for plan, size in plans
        )


def bytes_of_the_vae(group: Group, case: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Counted and planned: border rows of a decode, and its keys and values."""
    pipe = tiny(case)
    request = requested(pipe, group.size, case)
    stripes, counters = cut_in_stripes(case["height"] // 16, group.size), Counters()
    part = request.parts[0][group.rank]
    latents = pipe.vae.encoder.conv_in.weight.new_zeros(1, 16, 2 * part.rows, 2 * part.columns)
    counters.begin_step()
    decode_stripes(pipe.vae, latents, group, stripes, counters=counters)
    counted, planned = counters.as_dict(), traffic.decode_traffic(request, part)
    moments = 3 * 4 * 8 * NORMS
    return {
        "rows": (sum(counted["other_bytes"]) - moments, planned.rows_sent),
        "keys": (sum(counted["join_bytes"]), planned.gathered),
    }


NORMS = 1 + 2 * (2 + 4 * 2) + 1
"""Group norms of the tiny decoder, each of which adds up three numbers of four groups in float64: one in the attention,
two in each of two residual blocks in the middle and of two in each of four blocks, one at the end."""


def test_bytes_of_the_vae_are_those_that_the_engine_counts() -> None:
    case = {"height": 176, "width": 96, "window": 4, "vae_attention": True}
    for found in run_ranks(bytes_of_the_vae, 3, case):
        for name, (counted, planned) in found.items():
            assert counted == planned, name
