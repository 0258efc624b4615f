"""Step caches of one process on an unmodified transformer, written apart from the engine."""

from functools import partial
from typing import Any

from torch import Tensor

LISTS = ("transformer_blocks", "single_transformer_blocks", "layers")


class Plain:
    """Counts steps and passes by calls; the last two steps are computed."""

    def __init__(self, model: Any, *, steps: int, passes: int) -> None:
        self.calls, self.steps, self.passes = -1, steps, passes
        self.skipped: list[tuple[int, int]] = []
        """Step and pass."""
        self.stock = model.forward
        model.forward = self.forward

    def forward(self, *args: Any, **named: Any) -> Any:
        self.calls += 1
        self.step, self.turn = divmod(self.calls, self.passes)
        return self.stock(*args, **named)

    @property
    def may_skip(self) -> bool:
        return self.step < self.steps - 2


class PlainFirstBlock(Plain):
    def __init__(self, model: Any, threshold: float, image: slice, **how: int) -> None:
        super().__init__(model, **how)
        self.threshold, self.image = threshold, image
        self.changes: list[float] = []
        self.before: dict[int, Tensor] = {}
        self.others: dict[int, list[tuple[int, Tensor]]] = {}
        self.continued: list[tuple[int, int]] = []
        """Step and pass of what was left out after more than one step that was computed."""
        blocks = [block for name in LISTS for block in getattr(model, name, [])]
        for index, block in enumerate(blocks):
            block.forward = partial(self.block, index, len(blocks) - 1, block.forward)

    def block(self, index: int, last: int, stock: Any, *args: Any, **named: Any) -> Any:
        if index and self.is_skipping:  # as it came
            hidden = named["hidden_states"] if "hidden_states" in named else args[0]
            text = named.get("encoder_hidden_states")
            return hidden if text is None else (text, hidden)
        output = stock(*args, **named)
        image = (output[-1] if isinstance(output, tuple) else output)[:, self.image]
        if index == 0:
            given = (named["hidden_states"] if "hidden_states" in named else args[0])[:, self.image]
            self.decide(image, given)
            self.first = image.clone()
            if self.is_skipping:
                image += self.line()
        if index == last:
            self.others.setdefault(self.turn, []).append((self.step, image - self.first))
        return output

    def line(self) -> Tensor:
        """What the others would add, on a line through the last two steps in which they ran."""
        step_1, others_1 = self.others[self.turn][-1]
        if len(self.others[self.turn]) == 1:
            return others_1
        self.continued.append((self.step, self.turn))
        step_0, others_0 = self.others[self.turn][-2]
        slope = (others_1 - others_0) / (step_1 - step_0)
        return others_1 + (self.step - step_1) * slope

    def decide(self, image: Tensor, given: Tensor) -> None:
        added, before = image - given, self.before.get(self.turn)
        self.is_skipping = False
        if before is not None and self.may_skip:
            self.changes.append(float((added - before).abs().mean() / before.abs().mean()))
            self.is_skipping = self.changes[-1] < self.threshold
        if self.is_skipping:
            self.skipped.append((self.step, self.turn))
        else:
            self.before[self.turn] = added


class PlainTaylor(Plain):
    """Steps 0, 1, 2, 2 + N, 2 + 2 N, ... and the last two are computed; the rest are on a line through two of them."""

    def __init__(self, model: Any, every: int, **how: int) -> None:
        super().__init__(model, **how)
        self.every = every
        self.known: dict[int, list[tuple[int, list[Tensor]]]] = {}

    def forward(self, *args: Any, **named: Any) -> Any:
        known = self.known.setdefault((self.calls + 1) % self.passes, [])
        step = (self.calls + 1) // self.passes
        if step < 2 or (step - 2) % self.every == 0 or step >= self.steps - 2:
            output = super().forward(*args, **named)
            known.append((step, list(output[0]) if isinstance(output[0], list) else [output[0]]))
            return output
        self.calls += 1
        self.skipped.append((step, self.calls % self.passes))
        (step_0, values_0), (step_1, values_1) = known[-2:]
        weight = (step - step_0) / (step_1 - step_0)
        line = [x + weight * (y - x) for x, y in zip(values_0, values_1, strict=True)]
        return (line,) if "x" in named or (args and isinstance(args[0], list)) else (line[0],)
