"""`--lora` before anything is loaded: what it may name, and files that are refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from clear_dist import hub
from clear_dist.cards.folder import ModelFacts
from clear_dist.comm.group import Group
from clear_dist.families.cards import CARDS
from clear_dist.families.flux.card import FLUX_DEV, FluxShape
from clear_dist.launch.env import Place
from clear_dist.options import Options, Refusal
from clear_dist.request.flags import GenerateFlags
from clear_dist.request.lora import DEFAULT_FILE, compare_loras
from clear_dist.request.request import Lora
from clear_dist.request.settle import settle
from tests.tiny import make_tiny_flux, make_tiny_pipeline
from tests.tiny_lora import make_lora, save_lora

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_flux(tmp_path_factory.mktemp("model"))


@pytest.fixture
def tensors() -> Tensors:
    return make_lora(make_tiny_pipeline().transformer, seed=1)


def loras_of(model: Path | str, *loras: str) -> tuple[Lora, ...]:
    request, *_ = settle(GenerateFlags(model=str(model), lora=list(loras), device="cpu"), Place(), CARDS)
    return request.loras


def renamed(tensors: Tensors, old: str, new: str) -> Tensors:
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


def other_width(tensors: Tensors) -> Tensors:
    return make_lora(make_tiny_pipeline(heads=3).transformer, seed=1)


def stable_diffusion(tensors: Tensors) -> Tensors:
    layer = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k"
    return {f"{layer}.lora_down.weight": torch.zeros(4, 640), f"{layer}.lora_up.weight": torch.zeros(640, 4)}


def changed(**shapes: tuple[int, ...] | None) -> Callable[[Tensors], Tensors]:
    """The file with tensors of these shapes, by names with two underscores for dots; None: without them."""
    named = {name.replace("__", "."): shape for name, shape in shapes.items()}

    def change(tensors: Tensors) -> Tensors:
        kept = {name: x for name, x in tensors.items() if name not in named}
        return kept | {name: torch.zeros(shape) for name, shape in named.items() if shape is not None}

    return change


def only(**shapes: tuple[int, ...]) -> Callable[[Tensors], Tensors]:
    return lambda _: changed(**shapes)({})


EMBEDDER, CLIP = "transformer__x_embedder", "lora_te1_text_model_encoder_layers_0_mlp_fc1"
T5 = "text_encoder_2__encoder__block__0__layer__0__SelfAttention__q"
WRONG: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "names for a terminal": (
        lambda tensors: renamed(tensors, "x_embedder", "x\n\x1b[31membedder"),
        r"must have names that can be printed, got 'transformer\.x\\n",
    ),
    "another width": (other_width, r"must have 32 (inputs|outputs), got 48 in .*another model\?"),
    "more blocks": (
        lambda tensors: renamed(tensors, "transformer_blocks.0", "transformer_blocks.7"),
        r"transformer_blocks\.7\..*which this model has not; is it for another model\?",
    ),
    "Stable Diffusion": (stable_diffusion, "adapts lora_unet_input_blocks_4_1.*another model"),
    "a prefix of others": (
        lambda tensors: renamed(tensors, "transformer.", "unet."),
        r"adapts unet\..*, which this model has not",
    ),
    "LoHa": (
        only(lora_unet_double_blocks_0_img_mlp_0__hada_w1_a=(32, 4)),
        "LoRA and DoRA of linear layers and nothing else, got lora_unet_double_blocks_0_img_mlp_0.hada_w1_a",
    ),
    "LoKr": (only(transformer__x_embedder__lokr_w1=(8, 8)), r"nothing else, got transformer\.x_embedder\.lokr_w1"),
    "whole changes": (
        only(diffusion_model__img_in__diff=(32, 64)),
        r"nothing else, got diffusion_model\.img_in\.diff ",
    ),
    "an embedding": (only(clip_l=(2, 16)), "nothing else, got clip_l"),
    "no tensors": (lambda _: {}, "empty file"),
    "XLabs, another width": (
        only(double_blocks__0__processor__qkv_lora2__up__weight=(144, 4)),
        r"qkv_lora2\.up\.weight must have 96 outputs, got 144 in .*another model\?",
    ),
    "XLabs, more blocks": (
        only(single_blocks__7__processor__proj_lora__down__weight=(4, 160)),
        r"adapts single_blocks\.7\.processor\.proj_lora, which this model has not",
    ),
    "another kind of XLabs": (
        only(double_blocks__0__processor__ip_adapter_double_stream_k_proj__weight=(32, 4)),
        "nothing else, got double_blocks.0.processor.ip_adapter",
    ),
    "a number": (changed(transformer__x_embedder__lora_A__weight=()), "must have 64 inputs, got 0"),
    "one B less": (
        changed(transformer__x_embedder__lora_B__weight=None),
        r"has two matrices for each layer, got transformer\.x_embedder\.lora_A\.weight without B \(up\) in",
    ),
    "A alone": (
        lambda tensors: {name: x for name, x in tensors.items() if ".lora_A." in name},
        r"has two matrices for each layer, got .*lora_A\.weight without B \(up\) in",
    ),
    "alpha alone": (changed(transformer__proj_out__alpha=()), r"proj_out\.alpha without A \(down\) and B \(up\) in"),
    "two ranks": (
        changed(transformer__x_embedder__lora_A__weight=(4, 64)),
        r"of one rank, got \[4, 64\] and \[32, 3\] for transformer\.x_embedder\.lora_A\.weight and",
    ),
    "a convolution": (
        changed(transformer__x_embedder__lora_A__weight=(3, 1, 1, 64)),
        r"got \[3, 1, 1, 64\] and \[32, 3\]",
    ),
    "several alphas": (changed(transformer__x_embedder__alpha=(2,)), r"alpha must have 1 number, got 2"),
    "a short bias": (
        changed(transformer__x_embedder__lora_B__bias=(31,)),
        r"lora_B\.bias must have 32 outputs, got 31",
    ),
    "two adapters": (
        changed(transformer__x_embedder__lora_A__other__weight=(3, 64)),
        r"one LoRA in a file, got transformer\.x_embedder\.lora_A\..*weight and transformer\.x_embedder\.lora_A",
    ),
    "two names of a layer": (
        changed(img_in__lora_A__weight=(3, 64), img_in__lora_B__weight=(32, 3)),
        r"one LoRA in a file, got (img_in|transformer\.x_embedder).*; nearest: two files",
    ),
    "DoRA of one layer": (
        changed(transformer__x_embedder__lora_magnitude_vector=(32,)),
        "must have magnitudes of all layers, or of none, got",
    ),
    "DoRA over inputs": (
        changed(transformer__x_embedder__dora_scale=(1, 64)),
        "dora_scale must have 32 outputs, got 1",
    ),
    "DoRA with a bias": (
        changed(transformer__x_embedder__dora_scale=(32, 1), transformer__x_embedder__diff_b=(32,)),
        "a DoRA must have no biases, got transformer.x_embedder.dora_scale with one in",
    ),
    "integers": (
        lambda tensors: tensors | {"transformer.x_embedder.lora_A.weight": torch.zeros(3, 64, dtype=torch.int8)},
        "must hold floating-point numbers, got I8 in transformer.x_embedder.lora_A.weight of",
    ),
    "CLIP's layers": (
        changed(lora_te1_text_model_encoder_layers_9_mlp_fc1__lora_down__weight=(4, 16)),
        "adapts lora_te1_text_model_encoder_layers_9_mlp_fc1, which this model has not",
    ),
    "CLIP's width": (changed(**{f"{CLIP}__lora_down__weight": (4, 768)}), "must have 16 inputs, got 768 in"),
    "CLIP's halves": (changed(**{f"{CLIP}__lora_down__weight": (4, 16)}), r"lora_down\.weight without B \(up\) in"),
    "CLIP's table": (
        only(text_encoder__text_model__embeddings__token_embedding__lora_A__weight=(4, 80)),
        r"adapts text_encoder\.text_model\.embeddings\.token_embedding, which this model has not",
    ),
    "T5's width": (changed(**{f"{T5}__lora_A__weight": (4, 4096)}), "must have 24 inputs, got 4096 in"),
    "T5's layers": (
        only(lora_te3_encoder_block_23_layer_0_SelfAttention_q__lora_up__weight=(24, 4)),
        "adapts lora_te3_encoder_block_23_layer_0_SelfAttention_q, which this model has not",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_lora_for_another_model_is_refused(model: Path, tensors: Tensors, tmp_path: Path, what: str) -> None:
    change, message = WRONG[what]
    file = tmp_path / "style.safetensors"
    save_file(change(tensors), file)
    with pytest.raises(Refusal, match=message) as refused:
        loras_of(model, str(file))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("option", ["int8", "shard_weights", "hoist_modulation"])
def test_a_dora_needs_plain_weights(model: Path, tmp_path: Path, option: str) -> None:
    shapes = {"lora_A.weight": (2, 64), "lora_B.weight": (32, 2), "dora_scale": (32, 1)}
    file = tmp_path / "style.safetensors"
    save_file({f"transformer.x_embedder.{name}": torch.zeros(shape) for name, shape in shapes.items()}, file)
    assert loras_of(model, str(file))
    flags = GenerateFlags(model=str(model), lora=[str(file)], device="cpu", **{option: True})
    flag = f"--{option.replace('_', '-')}"
    with pytest.raises(Refusal, match=rf"is a DoRA, which needs plain weights, got {flag}; nearest: without {flag}"):
        settle(flags, Place(), CARDS)


def test_files_that_are_none_are_refused(model: Path, tensors: Tensors, tmp_path: Path) -> None:
    file = save_lora(tensors, tmp_path / "style.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-10])
    pickled = tmp_path / "style.bin"
    torch.save(tensors, pickled)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / DEFAULT_FILE).symlink_to(tmp_path / "nothing")
    for word, message in (
        (str(cut), "download it again"),
        (str(pickled), "pickled file"),
        (str(tmp_path / "none"), "must hold pytorch_lora_weights.safetensors or one safetensors file, got none"),
        (str(tmp_path), r"got cut\.safetensors, style\.safetensors; nearest: --lora .*/cut\.safetensors"),
        ("styles/missing.safetensors", "there is no 'styles/missing.safetensors'"),
        ("missing", "there is no 'missing'"),
        ("", "there is no ''"),
        (f"{file}:11", "from -10 to 10, got 11; nearest: 10"),
        (f"{file}:nan", "got nan; nearest: 1"),
    ):
        with pytest.raises(Refusal, match=message):
            loras_of(model, word)


def test_words_that_name_a_lora(model: Path, tensors: Tensors, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    file = save_lora(tensors, tmp_path / "one" / "style.safetensors")
    default = "someone/style:pytorch_lora_weights.safetensors"
    assert loras_of(model, str(file), f"{file}:0.5", f"{file.parent}:-1", "someone/style", "someone/style:.5") == (
        Lora(source=str(file)),
        Lora(source=str(file), weight=0.5),
        Lora(source=str(file), weight=-1.0),
        Lora(source=default),
        Lora(source=default, weight=0.5),
    )
    assert loras_of(model, "someone/style:more/x.safetensors:2")[0] == Lora(
        source="someone/style:more/x.safetensors", weight=2
    )
    assert loras_of(model, "someone/style@v2:my [v2] style.safetensors:2")[0] == Lora(
        source="someone/style@v2:my [v2] style.safetensors", weight=2
    )
    assert Lora(source=default).without_folders() == Lora(source=default)
    assert Lora(source=str(file)).without_folders() == Lora(source="style.safetensors")


def test_a_hub_model_is_compared_as_far_as_it_is_known(tensors: Tensors, tmp_path: Path) -> None:
    file = save_lora(tensors, tmp_path / "style.safetensors")
    assert loras_of("someone/flux", str(file))
    with pytest.raises(Refusal, match="must have 3072 inputs, got 32"):
        loras_of(FLUX_DEV, str(file))
    wider = ModelFacts(location="someone/flux", shape=FluxShape(attention_head_dim=16, num_attention_heads=3))
    with pytest.raises(Refusal, match="must have 48 inputs, got 32"):
        compare_loras([Lora(source=str(file))], wider, CARDS, Options())


def test_a_lora_of_the_hub_is_compared_once_it_is_fetched(
    model: Path, tensors: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is loaded; the hub is played by a folder."""
    monkeypatch.setattr(hub, "fetch", lambda wants, quiet: None)
    monkeypatch.setattr(hub, "cached", lambda want: tmp_path)
    flags = GenerateFlags(model=str(model), lora=["someone/style:style.safetensors:0.5"], device="cpu")
    request, *_ = settle(flags, Place(), CARDS)
    group = Group.create("cpu")
    try:
        file = save_lora(tensors, tmp_path / "style.safetensors")
        assert hub.locate(request, group, CARDS, local_rank=0).loras == request.loras
        assert list(hub.local_loras(request)) == [Lora(source=str(file), weight=0.5)]
        save_lora(other_width(tensors), file)
        with pytest.raises(Refusal, match=r"must have 32 (inputs|outputs), got 48 in .*another model\?"):
            hub.locate(request, group, CARDS, local_rank=0)
    finally:
        group.close()
