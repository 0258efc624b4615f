"""Memory that `clear-dist plan` predicts for a step of a transformer without text encoders and VAE."""

from benchmarks.lib.counts import TOKEN, Model, Part
from clear_dist.families.flux.card import FluxShape
from clear_dist.plan import GPUS, LINKS, ModelSizes, PlanRequest, TextSizes, VaeSizes
from clear_dist.plan.memory import rank_memory
from clear_dist.stages import Sampling, Upscaling

COUNTED = ("transformer", "activations", "attention", "masks", "halos", "text", "latents")


def planned_bytes(model: Model, part: Part, *, device_type: str, backend: str = "auto", hoisted: bool = False) -> int:
    """Bytes that torch allocates on the rank of `part`, without CUDA's own."""
    shape = FluxShape(
        num_layers=model.double_blocks,
        num_single_layers=model.single_blocks,
        num_attention_heads=model.heads,
        attention_head_dim=model.head_dim,
        guidance_embeds=True,
    )
    on_cuda = device_type == "cuda"
    request = PlanRequest(
        model=ModelSizes(
            name="random weights",
            double_blocks=model.double_blocks,
            single_blocks=model.single_blocks,
            heads=model.heads,
            head_dim=model.head_dim,
            text_channels=shape.joint_attention_dim,
            transformer=shape.tensors(),
            vae=VaeSizes(),
            text=TextSizes(),
        ),
        height=part.grid[0] * TOKEN,
        width=part.grid[1] * TOKEN,
        native=part.grid[0] * TOKEN,
        cascade=False,
        sampling=Sampling(steps=2),
        upscaling=Upscaling(),
        window=part.window,
        ranks=part.ranks,
        gpu=next(iter(GPUS.values())) if on_cuda else None,
        link=LINKS["nvlink"],
        text_tokens=model.text_tokens,
        dtype="bfloat16" if model.itemsize == 2 else "float32",
        backend=backend,
        hoist_modulation=hoisted,
    )
    step = next(phase for phase in rank_memory(request, part.rank).phases if phase.name == "denoise")
    return sum(amount for name, amount in step.items.items() if name in COUNTED)
