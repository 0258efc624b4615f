"""Parts of tiny random pipelines that families beside FLUX have, and their folders; FLUX's are in tests/tiny.py.

A family's own `make_tiny_<name>` is in its folder: all components, real configuration classes, made in seconds, weights
drawn by `draw_weights`.
"""

from pathlib import Path
from typing import Any

from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from tests.tiny import LETTERS

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_pipeline(pipe: Any, folder: Path | str) -> Path:
    """The folder, in diffusers' layout with safetensors."""
    pipe.save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def make_projected_clip(tokenizer: CLIPTokenizer, *, width: int, pooled: int) -> CLIPTextModelWithProjection:
    """A CLIP of two layers, `width` channels a token, `pooled` of the prompt."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=pooled,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def make_qwen_tokenizer() -> Qwen2Tokenizer:
    """Letter by letter with a chat template, no download."""
    letters = [*LETTERS, *LETTERS.upper()[:26], "Ġ", "Ċ"]  # as bytes are shown: a space, a new line
    tokenizer = Qwen2Tokenizer(
        vocab={letter: index for index, letter in enumerate(dict.fromkeys(letters))},
        merges=[],
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=4096,
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def make_qwen3(
    tokenizer: Qwen2Tokenizer, *, width: int, layers: int, causal: bool = False
) -> Qwen3Model | Qwen3ForCausalLM:
    """`width` channels a token; `causal`: with the head that predicts the next token."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=4096,
    )
    return Qwen3ForCausalLM(config) if causal else Qwen3Model(config)
