"""Two tokenizers for the demo: every word of the grammar is one token, anything else falls back to characters."""

from __future__ import annotations

import json
import string
from pathlib import Path

from transformers import CLIPTokenizer, T5TokenizerFast

from clear_dist.demo.grammar import CHOICES

FUNCTION_WORDS = frozenset({"over", "on", "in", "the", "sky", "trees", "land"})
WORDS = tuple(sorted({word for words in CHOICES.values() for word in words} | FUNCTION_WORDS))
CHARACTERS = string.ascii_lowercase + string.digits + "!\"#$%&'()*+,-./:;<=>?@[]_"
CLIP_LENGTH, T5_LENGTH = 32, 32
START, END, UNKNOWN, PAD = "<|startoftext|>", "<|endoftext|>", "<|unknown|>", "<|pad|>"


def clip_tokenizer() -> CLIPTokenizer:
    merges = _word_merges()
    pieces = [*CHARACTERS, *(character + "</w>" for character in CHARACTERS), *(a + b for a, b in merges)]
    # the end token must not be number 2, for which CLIPTextModel keeps an old rule
    vocabulary = {token: i for i, token in enumerate([PAD, UNKNOWN, START, END, *dict.fromkeys(pieces)])}
    return CLIPTokenizer(
        vocab=vocabulary, merges=merges, bos_token=START, eos_token=END, unk_token=UNKNOWN, pad_token=PAD,
        model_max_length=CLIP_LENGTH,
    )  # fmt: skip


def _word_merges() -> list[tuple[str, str]]:
    """Merges in order of priority: a word keeps what earlier words' merges make of it, then grows to the right."""
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        for merge in merges:
            parts = _merge(parts, merge)
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = _merge(parts, merges[-1])
    return merges


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def t5_tokenizer() -> T5TokenizerFast:
    """A unigram model in which the grammar's words are far likelier than their characters."""
    words = [(f"▁{word}", -2.0) for word in WORDS]
    characters = [(character, -10.0 if character != "," else -2.0) for character in ("▁", *CHARACTERS)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5TokenizerFast(vocab=[*special, *words, *characters], extra_ids=0, model_max_length=T5_LENGTH)


def save_clip_files(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """vocab.json and merges.txt beside tokenizer.json, for the slow tokenizer."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"]))
