"""A tiny random FLUX, made in a second or two: for tests of everything but the beauty of its pictures.

Same architecture, geometry (8x VAE, 2x2 packing: 16 pixels a token) and folder layout as FLUX.1-dev. All parameters
are drawn anew at a scale at which attention, modulation and text matter, so that comparing outputs means something.
"""

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

CLIP_WIDTH = 16
T5_WIDTH = 24
ROPE_AXES = {16: (4, 6, 6), 24: (8, 8, 8), 32: (8, 12, 12)}
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.-"


def make_tiny_flux(folder: Path | str, **options: int | bool) -> Path:
    """Save a tiny pipeline in diffusers' layout and return its folder. Options as `make_tiny_pipeline`."""
    make_tiny_pipeline(**options).save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def make_tiny_pipeline(
    *,
    seed: int = 0,
    double_blocks: int = 1,
    single_blocks: int = 1,
    heads: int = 2,
    head_dim: int = 16,
    guidance_embeds: bool = True,
    sample_size: int = 128,
    vae_blocks: int = 4,
) -> FluxPipeline:
    """A tiny FLUX pipeline on the CPU in float32; equal seeds give equal weights, in every process.

    Args:
        head_dim: 16, 24 or 32.
        guidance_embeds: True as in FLUX.1-dev, False as in FLUX.1-schnell.
        sample_size: native size in pixels.
        vae_blocks: 4 for tokens of 16 pixels, 5 for 32.
    """
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=double_blocks,
        num_single_layers=single_blocks,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        axes_dims_rope=ROPE_AXES[head_dim],
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=guidance_embeds,
    )
    tokenizer, tokenizer_2 = make_clip_tokenizer(), make_t5_tokenizer()
    generator = torch.Generator().manual_seed(seed)
    return FluxPipeline(
        transformer=draw_weights(transformer, generator),
        vae=draw_weights(make_vae(sample_size, vae_blocks), generator),
        text_encoder=draw_weights(make_clip(tokenizer), generator),
        text_encoder_2=draw_weights(make_t5(len(tokenizer_2)), generator),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        scheduler=make_scheduler(dynamic_shifting=guidance_embeds),
    )


def make_clear_weights(transformer: FluxTransformer2DModel, file: Path, *, seed: int = 1, down_factor: int = 1) -> Path:
    """Save a random CLEAR checkpoint that fits `transformer`: the image side of attention only.

    Args:
        down_factor: of down-sampled keys; 1: none.
    """
    image_side = ("attn.to_q.", "attn.to_k.", "attn.to_v.", "attn.to_out.0.")
    own = {name: value for name, value in transformer.state_dict().items() if any(part in name for part in image_side)}
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: _draw(name, value, generator) for name, value in own.items()}
    for name in transformer.attn_processors if down_factor > 1 else ():
        # Not all alike, and so large that pooled keys and values are seen among the others.
        weight = torch.rand(1, 1, 1, down_factor, 1, down_factor, 1, generator=generator)
        tensors[f"{name}.spatial_weight"] = weight * (3 / down_factor)
    save_file(tensors, file)
    return file


def draw_weights(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Draw all parameters anew, outputs of order 1 for inputs of order 1; returns the model, ready for inference."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_draw(name, parameter, generator))
    return model.eval().requires_grad_(False)


def make_scheduler(*, dynamic_shifting: bool = True) -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1-dev's scheduler, or FLUX.1-schnell's."""
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0 if dynamic_shifting else 1.0,
        use_dynamic_shifting=dynamic_shifting,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def make_clip_tokenizer() -> CLIPTokenizer:
    """Letter by letter, 77 positions, no download."""
    specials = ["<|startoftext|>", "<|endoftext|>"]
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), *specials]
    return CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=77)


def make_t5_tokenizer() -> T5Tokenizer:
    """Letter by letter, no download."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def make_vae(sample_size: int, blocks: int = 4) -> AutoencoderKL:
    """8x, 16 channels, as FLUX's; each further block halves the sides."""
    return AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=sample_size,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def make_clip(tokenizer: CLIPTokenizer, width: int = CLIP_WIDTH) -> CLIPTextModel:
    """`width`: the channels of the pooled prompt."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        projection_dim=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def make_t5(vocabulary: int, width: int = T5_WIDTH) -> T5EncoderModel:
    """`width`: the channels of a text token."""
    config = T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=12,
        d_ff=48,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config)


def _draw(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(like.shape, generator=generator)
    if like.ndim > 1:
        fan_in = 1 if _is_table(name) else math.prod(like.shape[1:])
        # Values three times as large: averaging over many keys makes them small again.
        return (3.0 if ".to_v." in name else 1.0) * noise / math.sqrt(fan_in)
    if name.endswith("bias"):
        return 0.2 * noise
    # Norms of queries and keys: logits with a spread of about 2, so that attention is neither flat nor one-hot.
    return (1.4 if "norm_q" in name or "norm_k" in name or "norm_added" in name else 1.0) + 0.1 * noise


def _is_table(name: str) -> bool:
    return "embedding" in name or "shared" in name or "relative_attention_bias" in name
