"""Components of the demo, assembled as a stock FluxPipeline, and their export."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from clear_dist.demo import tokenizers

WIDTH, HEAD_DIM, DOUBLE_BLOCKS, SINGLE_BLOCKS = 192, 32, 2, 6
TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS = 128, 2, 4
T5_POSITIONS = 512  # the length to which FluxPipeline pads by default


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1-dev's own configuration."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=True,
        base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096,
    )  # fmt: skip


def build_transformer() -> FluxTransformer2DModel:
    """FLUX's transformer with few and narrow blocks; the output layer starts at zero."""
    transformer = FluxTransformer2DModel(
        in_channels=64, num_layers=DOUBLE_BLOCKS, num_single_layers=SINGLE_BLOCKS, attention_head_dim=HEAD_DIM,
        num_attention_heads=WIDTH // HEAD_DIM, joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=False, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        for name, module in block.named_modules():
            if name in ("norm.linear", "norm1.linear", "norm1_context.linear"):  # every block starts as the identity
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
    return transformer


def build_clip() -> CLIPTextModel:
    tokenizer = tokenizers.clip_tokenizer()
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=TEXT_LAYERS, num_attention_heads=TEXT_HEADS, projection_dim=TEXT_WIDTH,
            max_position_embeddings=tokenizers.CLIP_LENGTH, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def build_t5() -> T5EncoderModel:
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizers.t5_tokenizer()), d_model=TEXT_WIDTH, d_kv=TEXT_WIDTH // TEXT_HEADS,
            d_ff=2 * TEXT_WIDTH, num_layers=TEXT_LAYERS, num_heads=TEXT_HEADS, feed_forward_proj="gated-gelu",
            dropout_rate=0.0, is_encoder_decoder=False, tie_word_embeddings=False,
            pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        )
    )  # fmt: skip
    nn.init.normal_(encoder.shared.weight, std=0.5)
    return encoder


def assemble(
    vae: AutoencoderKL, transformer: FluxTransformer2DModel, clip: CLIPTextModel, t5: T5EncoderModel
) -> FluxPipeline:
    return FluxPipeline(
        scheduler=build_scheduler(), vae=vae, transformer=transformer, text_encoder=clip, text_encoder_2=t5,
        tokenizer=tokenizers.clip_tokenizer(), tokenizer_2=tokenizers.t5_tokenizer(),
    )  # fmt: skip


def export(pipeline: FluxPipeline, folder: Path, extra: dict[str, Path] | None = None) -> None:
    """Write the pipeline in float16 and diffusers' layout, with `extra` files beside; replaces `folder` at once."""
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".weights-"))
    temporary.chmod(0o755)
    pipeline.to(torch.float16).save_pretrained(temporary, safe_serialization=True)
    _name_as_published(temporary / "text_encoder" / "model.safetensors")
    tokenizers.save_clip_files(pipeline.tokenizer, temporary / "tokenizer")
    index = temporary / "model_index.json"
    entries = json.loads(index.read_text())
    # transformers before 5 has the fast class under this name only; transformers 5 knows both
    entries["tokenizer_2"] = ["transformers", "T5TokenizerFast"]
    index.write_text(json.dumps(entries, indent=2) + "\n")
    for path in temporary.rglob("*.json"):
        _clean_configuration(path)
    for name, source in (extra or {}).items():
        shutil.copy(source, temporary / name)
    for path in temporary.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    if folder.exists():
        retired = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".weights-"))
        os.replace(folder, retired / "old")
        os.replace(temporary, folder)
        shutil.rmtree(retired)
    else:
        os.replace(temporary, folder)


def _name_as_published(clip: Path) -> None:
    """FLUX's own file has this prefix, with which every transformers reads it; a new model's is written without."""
    prefix = "text_model."
    tensors = {prefix + name.removeprefix(prefix): value for name, value in load_file(clip).items()}
    save_file(tensors, clip, metadata={"format": "pt"})


def _clean_configuration(path: Path) -> None:
    """Remove the path loaded from, and float16 as the type to load: it is to be asked for."""
    values = json.loads(path.read_text())
    if not isinstance(values, dict) or "vocab" in values:
        return
    values.pop("_name_or_path", None)
    if "dtype" in values:  # transformers would load float16 by itself, diffusers loads its own parts as float32
        values["dtype"] = "float32"
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
