"""The stale schedule in a single process, written apart from the engine: what each rank would hold, dense, uncut."""

from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from tests.oracle import DenseClearProcessor


def stripes_of(rows: int, ranks: int) -> list[range]:
    """Rows of each rank: as equal as can be, the taller ones first."""
    short, rest = divmod(rows, ranks)
    heights = [short + (rank < rest) for rank in range(ranks)]
    return [range(sum(heights[:rank]), sum(heights[: rank + 1])) for rank in range(ranks)]


class StaleProcessor(DenseClearProcessor):
    """One layer of an unmodified transformer, on `ranks` stripes, `by_columns` of those.

    From step max(1, warmup) on an image query takes fresh keys and values of its own stripe and of the text, and those
    of the step before elsewhere; text queries' output is what the step before would have given.
    """

    def __init__(
        self,
        height: int,
        width: int,
        radius: int | None,
        ranks: int,
        *,
        average: bool,
        warmup: int,
        passes: int = 1,
        by_columns: bool = False,
    ) -> None:
        self.stripes = stripes_of(width if by_columns else height, ranks)
        parts = self.stripes if average else None
        super().__init__(height, width, radius or height + width, parts, by_columns=by_columns)
        self.first_stale_step = max(1, warmup)
        # Full attention has no reduction to fall back on in its warm-up: its first one is not late.
        self.first_late_text = self.first_stale_step + (radius is None)
        self.passes = passes
        self.calls = 0
        self.held: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        step, turn = divmod(self.calls, self.passes)
        self.calls += 1
        query, key, value = self._project(attn, hidden_states, encoder_hidden_states)
        query, key = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (query, key))
        text = query.shape[1] - len(self.seen)
        late_key, late_value, late_output = self.held.get(turn, (key, value, key))
        self.held[turn] = (key, value, self._text_output(query[:, :text], key, value, text))
        output_text = late_output if step >= self.first_late_text else self.held[turn][2]
        if step < self.first_stale_step:
            late_key, late_value = key, value
        output = torch.cat([output_text, torch.full_like(query[:, text:], float("nan"))], dim=1)
        for stripe in self.stripes:
            mine = self.tokens_of(stripe)
            fresh = [*range(text), *(text + token for token in mine)]
            held_key, held_value = late_key.clone(), late_value.clone()
            held_key[:, fresh], held_value[:, fresh] = key[:, fresh], value[:, fresh]
            seen = torch.cat([torch.ones(len(self.seen), text, dtype=torch.bool), self.seen], dim=1)[mine]
            output[:, fresh[text:]] = self.attend_image(query[:, fresh[text:]], held_key, held_value, seen)
        output = output.flatten(2)
        if encoder_hidden_states is None:
            return output
        return attn.to_out[0](output[:, text:]), attn.to_add_out(output[:, :text])


def emulate(pipe: Any, *, height: int, width: int, window: int | str, ranks: int, **arguments: Any) -> None:
    """Make `pipe`, of unmodified diffusers, compute what `ranks` ranks would in its next generation."""
    radius = None if window == "full" else int(window)
    processors = {
        name: StaleProcessor(height, width, radius, ranks, **arguments) for name in pipe.transformer.attn_processors
    }
    pipe.transformer.set_attn_processor(processors)
