"""A transformer that is student and teacher: one set of frozen weights, two of what trains (paper, Sec. 3.3).

The image side of attention trains, the tensors of a CLEAR file; the teacher has copies of them, in 8 bits if need be.

Shapes: B pictures, C channels, H rows and W columns of latents.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from clear_dist.cards.clear import ALONE, JOINT, PROJECTIONS
from clear_dist.engine.family import Inputs
from clear_dist.engine.stock import attention_layers, require_stock
from clear_dist.engine.trainable import Trainable
from clear_dist.families.transformers import TRAINABLE
from clear_dist.training.attention import Layout, Passes, Pattern, PatternProcessor
from clear_dist.weights.clear import image_attention_parameters
from clear_dist.weights.quantised import Float8Linear, Int8Linear

TEACHERS: Mapping[str, Callable[[nn.Linear], nn.Module]] = {
    "same": lambda linear: linear,
    "int8": Int8Linear,
    "float8": Float8Linear,
}
"""What the teacher's own linear layers become."""


@dataclass(frozen=True)
class Student:
    transformer: Any
    trainable: Trainable
    passes: Passes

    @classmethod
    def of(
        cls, transformer: Any, pattern: Pattern, grid: tuple[int, int], *, every: int = 1, teacher: str = "same"
    ) -> "Student":
        """Put `pattern` on a stock transformer for pictures of `grid` tokens, and freeze what does not train.

        Of the layers that the family compares, those whose number is a multiple of `every` are.
        """
        require_stock(transformer)
        trainable = TRAINABLE[type(transformer).__name__](transformer)
        transformer.requires_grad_(False)
        layers = seeing_layers(transformer)
        passes = Passes(
            compared=frozenset(
                number
                for number, name in enumerate(layers)
                if trainable.compared.fullmatch(name) and not number % every
            )
        )
        for _, parameter in image_attention_parameters(transformer):
            parameter.data = parameter.data.clone()  # weights may be views of a file
            parameter.requires_grad_(True)
        for number, (name, attn) in enumerate(layers.items()):
            layout = Layout(
                layer=number,
                height=grid[0],
                width=grid[1],
                text_first=trainable.text_first,
                sees_text=JOINT.fullmatch(f"{name}.") is not None,
            )
            own = {part: each for part, each in attn.named_modules() if part in PROJECTIONS}
            copies = {part: TEACHERS[teacher](deepcopy(each).requires_grad_(False)) for part, each in own.items()}
            attn.set_processor(PatternProcessor(attn, pattern, layout, passes, copies))
        return cls(transformer, trainable, passes)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Parameters by their names in a CLEAR file."""
        return {name: each for name, each in self.transformer.named_parameters() if each.requires_grad}

    @property
    def processors(self) -> Iterator[PatternProcessor]:
        return (each for each in self.transformer.modules() if isinstance(each, PatternProcessor))

    @property
    def quantised(self) -> set[nn.Parameter]:
        """The teacher's weights in 8 bits."""
        return {
            weight for each in self.processors for weight in each.teacher.parameters() if not weight.is_floating_point()
        }

    def velocity(self, inputs: Inputs, like_BCHW: Tensor) -> Tensor:
        """Predicted velocity [B, C, H, W] in float32; the teacher's inside of `passes.teacher()`."""
        output = self.transformer(**inputs, return_dict=False)
        return self.trainable.velocity(output, like_BCHW).float()


def seeing_layers(transformer: Any) -> dict[str, Any]:
    """Attention layers that see the image, by name, in the order of the model's modules."""
    found = attention_layers(transformer).items()
    return {name: attn for name, attn in found if JOINT.fullmatch(f"{name}.") or ALONE.fullmatch(f"{name}.")}
