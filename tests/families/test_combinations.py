"""Features that were written apart, all at once: N ranks against an oracle in the unmodified pipeline."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from clear_dist.comm.group import Group
from clear_dist.families.cards import CARDS
from clear_dist.parallelize import parallelize
from clear_dist.request.request import Lora
from clear_dist.weights.clear import load_clear_weights
from clear_dist.weights.lora import load_loras
from tests.oracle import DenseClearProcessor
from tests.pooled_oracle import pool_keys
from tests.ranks import run_ranks
from tests.test_parallelize import relative_error, run
from tests.tiny import make_clear_weights
from tests.tiny_controlnet import make_tiny_controlled, make_tiny_controlnet, picture
from tests.tiny_lora import add_lora, make_lora, save_lora

HEIGHT, WIDTH, RADIUS = 12, 8, 3
"""Three units of 4 rows."""
WEIGHT = 0.7
CASES: list[dict[str, Any]] = [
    {"text_tokens": "sharded", "shard_weights": True, "hoist_modulation": True},
    {"text_tokens": "replicated"},
]


def make_pipeline() -> Any:
    return make_tiny_controlled(make_tiny_controlnet(modes=3))


def controlled(pipe: Any) -> Tensor:
    control = {"control_image": picture(HEIGHT, WIDTH, 1), "control_mode": 1}
    guided = {"negative_prompt": "fog", "true_cfg_scale": 2.0}
    return run(pipe, height=HEIGHT, width=WIDTH, steps=2, **control, **guided)


def striped(group: Group, clear: Path, style: Path) -> list[Tensor]:
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    results = []
    for case in CASES:
        pipe = make_pipeline()
        windows = {"clear_weights": clear, "controlnet_window": RADIUS}
        handle = parallelize(pipe, group=group, text_attention="exact", **windows, **case)
        load_loras(pipe, [Lora(source=str(style), weight=WEIGHT)], CARDS)
        results.append(controlled(pipe))
        handle.undo()
    return results


def test_control_lora_and_down_sampled_keys_with_all_that_shares_work(tmp_path: Path) -> None:
    """The ControlNet sees no down-sampled keys and all of the text, yet its stripes are the transformer's."""
    pipe = make_pipeline()
    clear = make_clear_weights(pipe.transformer, tmp_path / f"clear_local_{RADIUS}_down_4.safetensors", down_factor=4)
    style = make_lora(pipe.transformer, seed=3)
    file = save_lora(style, tmp_path / "style.safetensors")

    load_clear_weights(pipe.transformer, clear)
    pool_keys(pipe, load_file(clear), RADIUS, height=HEIGHT, width=WIDTH)
    pipe.controlnet.set_attn_processor(DenseClearProcessor(HEIGHT, WIDTH, RADIUS))
    without = controlled(pipe)
    add_lora(pipe.transformer, style, WEIGHT)
    expected = controlled(pipe)
    assert relative_error(without, expected) > 1e-2
    for results in run_ranks(striped, 3, clear, file):
        for latents in results:
            assert relative_error(latents, expected) < 1e-4
