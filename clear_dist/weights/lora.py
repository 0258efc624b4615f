"""LoRA beside the layers of a model, as adapters of peft.

Names and scales are ours (`cards/lora.py`): what is refused before loading and what is loaded are the same tensors.
"""

import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import recurse_remove_peft_layers
from safetensors.torch import load_file
from torch import Tensor

from clear_dist.cards.card import Cards
from clear_dist.cards.lora import Layers, Pair, linear_layers, read_pairs
from clear_dist.options import Refusal
from clear_dist.request.request import Lora, adapter_name

Tensors = Mapping[str, Tensor]

KIND = re.compile(r"(\.lora_\w+)\.(weight|bias)$")
"""Between these two a model has the adapter's name, a file has not."""


def load_loras(pipe: Any, loras: Iterable[Lora], cards: Cards) -> None:
    """Put LoRA on the parts of a pipeline that are here, each with its weight.

    Raises a Refusal as `read_pairs`, where numbers are not finite, and where a layer has got no adapter.
    """
    names = ("transformer", *sorted(name for name in pipe.components if name.startswith("text_encoder")))
    here = {name: part for name in names if (part := getattr(pipe, name)) is not None}
    layers = {name: _layers_of(here[name], cards) if name in here else None for name in names}
    for number, lora in enumerate(loras):
        file, adapter = Path(lora.source), adapter_name(number)
        tensors, pairs = load_file(file), defaultdict(list)
        for pair in read_pairs(file, layers):
            pairs[pair.part].append(pair)
        for name in pairs.keys() & here.keys():
            state = {key: x for pair in pairs[name] for key, x in _landed(pair, tensors, lora.weight, file)}
            _adapt(here[name], state, adapter, f"{file} must adapt {len(pairs[name])} layers of the {name}")
    for part in here.values():
        if adapters := list(getattr(part, "peft_config", ())):
            part.set_adapter(adapters)


def unload_loras(pipe: Any) -> None:
    """Take all LoRA off again; the layers are as they were."""
    for part in pipe.components.values():
        if getattr(part, "peft_config", None):
            recurse_remove_peft_layers(part)
            del part.peft_config
            part._hf_peft_config_loaded = False


def _layers_of(part: Any, cards: Cards) -> Layers:
    """Layers by the family's card, or by a text encoder's weights, which may have adapters already."""
    card = cards.of_transformer(type(part).__name__)
    if card is not None:
        return card.shape_of(part.config, "config.json").lora_layers()
    weights = {name.replace(".base_layer", ""): x.shape for name, x in part.named_parameters() if ".lora_" not in name}
    return linear_layers(weights)


def _landed(pair: Pair, tensors: Tensors, weight: float, file: Path) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the adapters that a pair becomes, by peft's names; alpha and `weight` are in B and in biases."""
    layer, own = pair.layer, {kind: tensors[name].float() for kind, name in pair.tensors.items()}
    assert layer is not None, "its part is here"
    for kind, x in own.items():
        if not x.isfinite().all():
            raise Refusal(f"a LoRA must hold finite numbers, got NaN or infinity in {pair.tensors[kind]} of {file}")
    scale = weight * float(own.get("alpha", pair.alpha)) / pair.rank
    added = {"lora_B.weight": own["up"] * scale}
    if "magnitude" in own:
        added["lora_magnitude_vector.weight"] = own["magnitude"].flatten()
    if "bias" in own or "diff_b" in own:
        added["lora_B.bias"] = scale * own.get("bias", torch.zeros(())) + weight * own.get("diff_b", torch.zeros(()))
    for name, x in added.items():
        outputs = x.roll(layer.outputs // 2, 0) if layer.is_swapped else x
        for module, mine in zip(layer.modules, outputs.split([*layer.modules.values()]), strict=True):
            yield f"{module}.{name}", mine
    for module in layer.modules:
        yield f"{module}.lora_A.weight", own["down"]


def _adapt(part: Any, state: Tensors, adapter: str, rule: str) -> None:
    """Put the adapter beside the layers, and see that it has got there; raises a Refusal that begins with `rule`."""
    import peft  # an extra, which those who have no LoRA need not install

    ranks = {key.removesuffix(".lora_A.weight"): len(x) for key, x in state.items() if key.endswith(".lora_A.weight")}
    by_rank = {rank: _these(name for name in ranks if ranks[name] == rank) for rank in set(ranks.values())}
    patterns = {f"^{names}": rank for rank, names in by_rank.items()}
    biases = {f"{name}.lora_B.bias" for name in ranks} if any(key.endswith(".bias") for key in state) else set()
    config = peft.LoraConfig(
        r=min(by_rank),
        target_modules=_these(ranks),
        rank_pattern=patterns,
        alpha_pattern=patterns,  # a scale of 1: it is in the tensors
        use_dora=any("magnitude" in key for key in state),
        lora_bias=bool(biases),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are what is wanted
        part.add_adapter(config, adapter)
    absent = {key: torch.zeros(len(state[key.replace(".bias", ".weight")])) for key in biases - state.keys()}
    # Not by `peft.set_peft_model_state_dict`, which asks for the whole model's, shards included.
    own = {KIND.sub(rf"\1.{adapter}.\2", key): x for key, x in (*state.items(), *absent.items())}
    loaded = part.load_state_dict(own, strict=False)
    adapted = {
        name
        for name, layer in part.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer) and adapter in layer.lora_A
    }
    if lost := [*(ranks.keys() ^ adapted), *loaded.unexpected_keys]:
        raise Refusal(f"{rule}, and peft did not take {min(lost)}")


def _these(names: Iterable[str]) -> str:
    """A pattern for these names alone: peft takes a name for the end of others."""
    return f"({'|'.join(map(re.escape, names))})"
