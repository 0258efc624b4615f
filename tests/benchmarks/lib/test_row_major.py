"""The official layout that CLEAR is compared with: does it compute CLEAR?"""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.lib.row_major import BLOCK, RowMajorProcessor, row_major_mask
from clear_dist.attention import BACKENDS, attend, window_attention
from tests.tiny import make_tiny_pipeline

CPU = torch.device("cpu")


@pytest.mark.parametrize(("grid", "text", "radius"), [((13, 11), 7, 4), ((20, 18), 130, 8), ((16, 8), 128, 30)])
def test_the_mask_is_what_create_block_mask_makes(grid, text, radius):
    mask = row_major_mask(grid, text, radius, CPU)
    length = text + grid[0] * grid[1]
    expected = create_block_mask(mask.mask_mod, None, None, length, length, device="cpu", BLOCK_SIZE=BLOCK)
    assert mask.seq_lengths == (length, length)
    assert torch.equal(mask.kv_num_blocks, expected.kv_num_blocks)
    assert torch.equal(mask.full_kv_num_blocks, expected.full_kv_num_blocks)
    assert torch.equal(mask.to_dense(), expected.to_dense())


def test_a_layer_is_that_of_the_reference():
    text, side, radius = 37, 20, 5
    query, key, value = torch.randn(3, 1, text + side**2, 2, 16)
    mask = row_major_mask((side, side), text, radius, CPU)
    out = flex_attention(*(x.transpose(1, 2) for x in (query, key, value)), block_mask=mask).transpose(1, 2)
    (_, query_image), (key_text, key_image), (value_text, value_image) = (
        (x[:, :text], x[:, text:].unflatten(1, (side, side))) for x in (query, key, value)
    )
    image = window_attention(
        query_image, key_image, value_image, key_text, value_text, radius=radius, row_offset=0,
        backend=BACKENDS["reference"],
    )[0]  # fmt: skip
    torch.testing.assert_close(out[:, text:], image.flatten(1, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(out[:, :text], attend(query[:, :text], key, value)[0], atol=1e-5, rtol=0)


def test_its_processor_is_diffusers_own_but_for_the_kernel(monkeypatch):
    monkeypatch.setattr("benchmarks.lib.row_major._compiled", lambda: flex_attention)  # half a minute
    pipe = make_tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    embeddings = {"prompt_embeds": torch.randn(1, 7, 24), "pooled_prompt_embeds": torch.randn(1, 16)}

    def latents():
        generator = torch.Generator().manual_seed(0)
        size = {"height": 208, "width": 96, "num_inference_steps": 2}
        return pipe(**embeddings, **size, generator=generator, output_type="latent").images

    stock = latents()
    pipe.transformer.set_attn_processor(RowMajorProcessor(row_major_mask((13, 6), 7, 40, CPU)))  # a circle over all
    torch.testing.assert_close(latents(), stock, atol=1e-4, rtol=1e-4)
    pipe.transformer.set_attn_processor(RowMajorProcessor(row_major_mask((13, 6), 7, 2, CPU)))
    assert not torch.allclose(latents(), stock, atol=0.05)
