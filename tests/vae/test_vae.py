"""The VAE over stripes against diffusers' own `decode` and `encode`, and what it holds in memory meanwhile."""

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import GroupNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.geometry import Rows, cut_in_stripes
from clear_dist.vae import decode_stripes, encode_stripes
from clear_dist.vae.stripe_ops import StripeOps, frame
from tests.ranks import run_ranks
from tests.tiny import draw_weights

FLUX_LIKE = {
    "norm_num_groups": 4,
    "mid_block_add_attention": True,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
DEMO_LIKE = {
    "norm_num_groups": 1,
    "mid_block_add_attention": False,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
KINDS = (FLUX_LIKE, DEMO_LIKE)
WIDTHS = (8, 16, 16)
SCALE = 4  # pixels per row of latents with three widths


def make_vae(*, widths: tuple[int, ...] = WIDTHS, **options: Any) -> AutoencoderKL:
    vae = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1,
        latent_channels=4,
        **options,
    )
    return draw_weights(vae, torch.Generator().manual_seed(0))


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def mine(whole: Tensor, stripes: tuple[Rows, ...], group: Group) -> Tensor:
    own, unit = stripes[group.rank], whole.shape[2] // stripes[-1].stop
    return whole[:, :, own.start * unit : own.stop * unit]


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operations inside have made and that are still referred to: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._meet(tensor.untyped_storage())
        return result

    def _meet(self, storage: torch.UntypedStorage) -> None:
        pointer, size = storage._cdata, storage.nbytes()
        if pointer not in self._known:
            self._known.add(pointer)
            self.now += size
            self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)
            weakref.finalize(storage, self._forget, pointer, size)

    def _forget(self, pointer: int, size: int) -> None:
        self._known.discard(pointer)
        self.now -= size


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are tiny, and threads that wait for each other on a busy machine take seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def alone() -> Iterator[Group]:
    group = Group.create("cpu")
    yield group
    group.close()


def draw_both(rows: int, width: int = 7) -> tuple[Tensor, Tensor]:
    """Latents and pixels: two rows of latents per unit of a stripe, as FLUX's tokens have, and a batch of two."""
    return draw(2, 4, 2 * rows, width), draw(2, 3, 2 * rows * SCALE, width * SCALE + 1)


def code_both(group: Group, rows: int, max_bytes: int) -> list[Tensor]:
    """Decode and encode by each kind of VAE."""
    stripes = cut_in_stripes(rows, group.size)
    latents, pixels = (mine(whole, stripes, group) for whole in draw_both(rows))
    results = []
    for vae in (make_vae(**options) for options in KINDS):
        results.append(decode_stripes(vae, latents, group, stripes, max_bytes=max_bytes))
        results.append(encode_stripes(vae, pixels, group, stripes, max_bytes=max_bytes))
    return results


@torch.no_grad()
def assert_as_diffusers(parts: list[list[Tensor]], rows: int) -> None:
    latents, pixels = draw_both(rows)
    coded = [torch.cat(stripes, dim=2) for stripes in zip(*parts, strict=True)]
    for index, vae in enumerate(make_vae(**options) for options in KINDS):
        expected = vae.decode(latents).sample, vae.encode(pixels).latent_dist.parameters
        assert all(0.1 < whole.std() < 10 for whole in expected)
        torch.testing.assert_close(tuple(coded[2 * index : 2 * index + 2]), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("max_bytes", [1, 60_000, 1 << 30])
def test_one_rank_computes_what_diffusers_does(alone: Group, max_bytes: int) -> None:
    assert_as_diffusers([code_both(alone, 3, max_bytes)], 3)


@pytest.mark.parametrize(("size", "rows", "max_bytes"), [(2, 3, 1 << 30), (3, 5, 60_000), (5, 6, 1)])
def test_stripes_are_what_diffusers_computes(size: int, rows: int, max_bytes: int) -> None:
    assert_as_diffusers(run_ranks(code_both, size, rows, max_bytes), rows)


def code_bf16(group: Group) -> tuple[Tensor, Tensor]:
    vae, stripes = make_vae(**FLUX_LIKE).bfloat16(), cut_in_stripes(5, group.size)
    latents, pixels = draw(1, 4, 10, 8).bfloat16(), draw(1, 3, 40, 32).bfloat16()
    decoded = decode_stripes(vae, mine(latents, stripes, group), group, stripes)
    return decoded, encode_stripes(vae, mine(pixels, stripes, group), group, stripes)


def test_bfloat16_is_as_close_to_float32_as_diffusers_is() -> None:
    decoded, encoded = (torch.cat(stripes, dim=2) for stripes in zip(*run_ranks(code_bf16, 2), strict=True))
    vae, half = make_vae(**FLUX_LIKE), make_vae(**FLUX_LIKE).bfloat16()
    latents, pixels = draw(1, 4, 10, 8).bfloat16(), draw(1, 3, 40, 32).bfloat16()
    with torch.no_grad():
        exact = vae.decode(latents.float()).sample, vae.encode(pixels.float()).latent_dist.parameters
        stock = half.decode(latents).sample, half.encode(pixels).latent_dist.parameters
    for ours, theirs, reference in zip((decoded, encoded), stock, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - reference).square().mean() < 1.5 * (theirs - reference).square().mean()


def measure_decode(group: Group, rows: int, width: int, max_bytes: int) -> list[int]:
    """The peak of each kind of VAE, without its input."""
    stripes = cut_in_stripes(rows, group.size)
    latents = mine(draw(1, 4, 2 * rows, width), stripes, group)
    peaks = []
    for vae in (make_vae(widths=(16, 16, 16), **options) for options in KINDS):
        with LiveBytes() as live:
            decode_stripes(vae, latents, group, stripes, max_bytes=max_bytes)
        peaks.append(live.peak)
    return peaks


def test_peak_memory_is_two_feature_maps_and_one_chunk(alone: Group) -> None:
    rows, width, max_bytes = 64, 16, 1 << 17
    feature_map = 4 * 16 * (2 * rows * SCALE) * (width * SCALE)
    of_one, of_four = (
        [max(peaks) for peaks in zip(*parts, strict=True)]
        for parts in (
            [measure_decode(alone, rows, width, max_bytes)],
            run_ranks(measure_decode, 4, rows, width, max_bytes),
        )
    )
    for one, four in zip(of_one, of_four, strict=True):
        # Besides rows of halo and the latents.
        assert 2 * feature_map < one < 2.05 * feature_map + max_bytes
        assert four < 2.1 * feature_map / 4 + max_bytes
        assert four <= 0.35 * one


def test_one_rank_holds_less_than_diffusers(alone: Group) -> None:
    vae, latents = make_vae(**FLUX_LIKE), draw(1, 4, 64, 16)
    with LiveBytes() as ours:
        decode_stripes(vae, latents, alone, (Rows(0, 32),), max_bytes=1 << 17)
    with torch.no_grad(), LiveBytes() as theirs:
        vae.decode(latents)
    assert ours.peak < theirs.peak


def test_attention_never_holds_the_scores(alone: Group) -> None:
    height, width = 48, 48
    with LiveBytes() as live:
        decode_stripes(make_vae(**FLUX_LIKE), draw(1, 4, height, width), alone, (Rows(0, 24),), max_bytes=1 << 20)
    assert live.largest < 4 * (height * width) ** 2 / 4


def count_messages(group: Group) -> tuple[int, int]:
    counters, stripes = Counters(), cut_in_stripes(3, group.size)
    counters.begin_step()
    latents = mine(draw(1, 4, 6, 8), stripes, group)
    decode_stripes(make_vae(**FLUX_LIKE), latents, group, stripes, counters=counters)
    sent = counters.as_dict()
    return sent["other_bytes"][0], sent["join_bytes"][0]


def test_bytes_sent_do_not_depend_on_the_height_but_for_keys_and_values() -> None:
    above, middle, below = run_ranks(count_messages, 3)
    # Channels of the rows that convolutions are given: per width of the picture 8, 16 and 32, then the head.
    halos = 4 * (8 * (4 + 4 * 16 + 4 * 16 + 16) + 16 * (4 * 16 + 16) + 32 * (16 + 8 + 8 + 8 + 8))
    norms = 4 + 1 + 12 + 1  # two in each resnet, one in attention, one in the head
    moments = norms * 3 * 4 * 8
    keys_and_values = 2 * 4 * 16 * 2 * 8
    assert above == below == (halos + moments, keys_and_values)
    assert middle == (2 * halos + moments, keys_and_values)


def test_group_norm_keeps_a_small_variance_around_a_large_mean(alone: Group) -> None:
    x = 1000 + 0.1 * draw(1, 8, 32, 16)
    norm = GroupNorm(2, 8, eps=1e-6)
    ops = StripeOps(alone, (Rows(0, 32),), max_bytes=1, counters=Counters())
    ours = ops.normalised(frame(x), norm)(x)
    torch.testing.assert_close(ours.double(), norm.double()(x.double()), atol=5e-3, rtol=0)


def test_wrong_requests_are_refused(alone: Group) -> None:
    stripes = (Rows(0, 3),)
    vae = make_vae(**DEMO_LIKE)
    with pytest.raises(ValueError, match="multiple of 3, got"):
        decode_stripes(vae, draw(1, 4, 4, 4), alone, stripes)
    with pytest.raises(ValueError, match="max_bytes must be at least 1, got 0"):
        decode_stripes(vae, draw(1, 4, 6, 4), alone, stripes, max_bytes=0)
    with pytest.raises(ValueError, match="multiple of 4 rows, got 6"):
        encode_stripes(vae, draw(1, 3, 6, 8), alone, stripes)
    other = AutoencoderKL(up_block_types=("AttnUpDecoderBlock2D",), norm_num_groups=4)
    with pytest.raises(ValueError, match="must be a UpDecoderBlock2D, got AttnUpDecoderBlock2D"):
        decode_stripes(other, draw(1, 4, 3, 4), alone, stripes)


def code_by_products(group: Group, by_products: bool) -> list[Tensor]:
    """Decode and encode of a batch of two whose attention has several blocks, the last ones ragged, and two heads."""
    vae, stripes = attending_vae(), cut_in_stripes(12, group.size)
    latents, pixels = draw(2, 4, 24, 26), draw(2, 3, 96, 104)
    coded = []
    for code, whole in ((decode_stripes, latents), (encode_stripes, pixels)):
        coded.append(code(vae, mine(whole, stripes, group), group, stripes, max_bytes=1, by_products=by_products))
    return coded


def attending_vae() -> AutoencoderKL:
    vae = make_vae(**FLUX_LIKE)
    for coder in (vae.encoder, vae.decoder):
        coder.mid_block.attentions[0].heads = 2
    return vae


@torch.no_grad()
def test_attention_by_products_is_what_diffusers_computes(alone: Group) -> None:
    expected = attending_vae().decode(draw(2, 4, 24, 26)).sample
    moments = attending_vae().encode(draw(2, 3, 96, 104)).latent_dist.parameters
    fused, one = code_by_products(alone, False), code_by_products(alone, True)
    three = [torch.cat(stripes, dim=2) for stripes in zip(*run_ranks(code_by_products, 3, True), strict=True)]
    for number, exact in enumerate((expected, moments)):
        for coded in (one[number], three[number]):
            torch.testing.assert_close(coded, exact, atol=1e-4, rtol=0)
            assert (coded - fused[number]).norm() < 1e-6 * exact.norm()
