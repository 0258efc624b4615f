"""`--lora`: what is refused before ranks start, and pictures with it against weights that it was added to by hand."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from clear_dist import hub
from clear_dist.comm.group import Group
from clear_dist.commands.prepare import load_loras
from clear_dist.families.cards import CARDS
from clear_dist.families.flux.card import FLUX_DEV, FluxShape
from clear_dist.launch.env import Place
from clear_dist.options import Refusal
from clear_dist.request.flags import GenerateFlags
from clear_dist.request.lora import compare_loras
from clear_dist.request.request import Lora
from clear_dist.request.settle import settle
from tests.commands.test_generate import generate_on_ranks
from tests.test_parallelize import relative_error, run
from tests.tiny import make_tiny_flux, make_tiny_pipeline
from tests.tiny_lora import add_lora, as_kohya, make_lora, save_lora

Tensors = dict[str, Tensor]
TEXT_LAYERS = re.compile(r".*\.(q_proj|v_proj|fc1)")


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


WRONG: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "another width": (other_width, r"must have 32 (inputs|outputs), got 48 in .*another model\?"),
    "more blocks": (
        lambda tensors: renamed(tensors, "transformer_blocks.0", "transformer_blocks.7"),
        r"transformer_blocks\.7\..*which this model has not; is it for another model\?",
    ),
    "Stable Diffusion": (stable_diffusion, "adapts lora_unet_input_blocks_4_1.*another model"),
    "DoRA": (
        lambda tensors: tensors | {"transformer.x_embedder.lora_magnitude_vector": torch.ones(32)},
        "LoRA of linear layers and nothing else, got transformer.x_embedder.lora_magnitude_vector",
    ),
    "LoHa": (
        lambda _: {"lora_unet_double_blocks_0_img_mlp_0.hada_w1_a": torch.zeros(32, 4)},
        "nothing else, got lora_unet_double_blocks_0_img_mlp_0.hada_w1_a",
    ),
    "no tensors": (lambda _: {}, "empty file"),
    "XLabs, another width": (
        lambda _: {"double_blocks.0.processor.qkv_lora2.up.weight": torch.zeros(144, 4)},
        r"qkv_lora2\.up\.weight must have 96 outputs, got 144 in .*another model\?",
    ),
    "XLabs, more blocks": (
        lambda _: {"single_blocks.7.processor.proj_lora.down.weight": torch.zeros(4, 160)},
        r"adapts single_blocks\.7\.processor\.proj_lora, which this model has not",
    ),
    "another kind of XLabs": (
        lambda _: {"double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight": torch.zeros(32, 4)},
        "LoRA of linear layers and nothing else, got double_blocks.0.processor.ip_adapter",
    ),
    "a number": (lambda _: {"transformer.x_embedder.lora_A.weight": torch.tensor(1.0)}, "must have 64 inputs, got 0"),
}


@pytest.mark.parametrize("what", WRONG)
def test_lora_for_another_model_is_refused(model: Path, tensors: Tensors, tmp_path: Path, what: str) -> None:
    change, message = WRONG[what]
    file = tmp_path / "style.safetensors"
    save_file(change(tensors), file)
    with pytest.raises(Refusal, match=message) as refused:
        loras_of(model, str(file))
    assert "\n" not in str(refused.value)


def test_files_that_are_none_are_refused(model: Path, tensors: Tensors, tmp_path: Path) -> None:
    file = save_lora(tensors, tmp_path / "style.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-10])
    pickled = tmp_path / "style.bin"
    torch.save(tensors, pickled)
    (tmp_path / "none").mkdir()
    for word, message in (
        (str(cut), "download it again"),
        (str(pickled), "pickled file"),
        (str(tmp_path / "none"), "must hold pytorch_lora_weights.safetensors or one safetensors file, got none"),
        (str(tmp_path), r"got cut\.safetensors, style\.safetensors"),
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
    assert Lora(source=default).without_folders() == Lora(source=default)
    assert Lora(source=str(file)).without_folders() == Lora(source="style.safetensors")


def test_a_hub_model_is_compared_as_far_as_it_is_known(tensors: Tensors, tmp_path: Path) -> None:
    file = save_lora(tensors, tmp_path / "style.safetensors")
    assert loras_of("someone/flux", str(file))
    with pytest.raises(Refusal, match="must have 3072 inputs, got 32"):
        loras_of(FLUX_DEV, str(file))
    with pytest.raises(Refusal, match="must have 48 inputs, got 32"):
        compare_loras([Lora(source=str(file))], FluxShape(attention_head_dim=16, num_attention_heads=3), CARDS)


def test_a_lora_of_the_hub_is_compared_once_it_is_fetched(
    model: Path, tensors: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is loaded; the hub is played by a folder."""
    monkeypatch.setattr(hub, "fetch", lambda wants: None)
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


def test_the_original_names_have_the_sizes_of_what_diffusers_makes_of_them() -> None:
    """Fused projections are those of their parts together."""
    sizes = FluxShape(guidance_embeds=True).lora_layers()
    double, single = "transformer_blocks_18", "single_transformer_blocks_37"
    together = {
        "double_blocks_18_img_attn_qkv": [f"{double}_attn_to_{x}" for x in "qkv"],
        "double_blocks_18_txt_attn_qkv": [f"{double}_attn_add_{x}_proj" for x in "qkv"],
        "double_blocks_18_txt_attn_proj": [f"{double}_attn_to_add_out"],
        "double_blocks_18_txt_mlp_0": [f"{double}_ff_context_net_0_proj"],
        "double_blocks_18_img_mlp_2": [f"{double}_ff_net_2"],
        "double_blocks_18_img_mod_lin": [f"{double}_norm1_linear"],
        "single_blocks_37_linear1": [*(f"{single}_attn_to_{x}" for x in "qkv"), f"{single}_proj_mlp"],
        "single_blocks_37_linear2": [f"{single}_proj_out"],
        "single_blocks_37_modulation_lin": [f"{single}_norm_linear"],
        "img_in": ["x_embedder"],
        "txt_in": ["context_embedder"],
        "vector_in_in_layer": ["time_text_embed_text_embedder_linear_1"],
        "guidance_in_out_layer": ["time_text_embed_guidance_embedder_linear_2"],
        "final_layer_linear": ["proj_out"],
        "final_layer_adaLN_modulation_1": ["norm_out_linear"],
    }
    for original, parts in together.items():
        assert sizes[original] == (sum(sizes[part][0] for part in parts), sizes[parts[0]][1]), original


def test_lora_of_the_text_encoder_too_on_two_ranks(
    model: Path, tensors: Tensors, tmp_path: Path, monkeypatch: Any
) -> None:
    """Only rank 0 has a text encoder. A second one is in kohya's format, which halves it by its alpha."""
    monkeypatch.chdir(tmp_path)
    stock = FluxPipeline.from_pretrained(model)
    text = make_lora(stock.text_encoder, seed=2, prefix="text_encoder", layers=TEXT_LAYERS)
    kohya = as_kohya(make_lora(stock.transformer, seed=3), alpha=1.5)
    save_lora(tensors | text, tmp_path / "style.safetensors")
    save_lora(kohya, tmp_path / "kohya.safetensors")
    arguments = (
        "a hill",
        "--window",
        "full",
        "--clear-weights",
        "none",
        "--nproc",
        "2",
        "--latents-out",
        "x.safetensors",
    )
    loras = ("--lora", "style.safetensors:0.5", "--lora", "./kohya.safetensors")
    assert generate_on_ranks(model, *arguments, *loras) == 0

    add_lora(stock.transformer, tensors, 0.5)
    add_lora(stock.text_encoder, text, 0.5, prefix="text_encoder")
    mine = {
        name: x
        for name, x in make_lora(stock.transformer, seed=3).items()
        if re.search(r"\.ff\.|single.*proj_out", name)
    }
    add_lora(stock.transformer, mine, 1.5 / 3)
    stock.set_progress_bar_config(disable=True)
    settings = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 16, "guidance_scale": 3.5}
    generator = torch.Generator().manual_seed(5)
    expected = stock("a hill", **settings, generator=generator, output_type="latent").images
    assert relative_error(load_file("x.safetensors")["latents"], expected) < 1e-4
    with Image.open("clear-dist.png") as picture:
        told = json.loads(picture.text["settings"])["loras"]  # type: ignore[attr-defined]
    assert told == [{"source": "style.safetensors", "weight": 0.5}, {"source": "kohya.safetensors", "weight": 1.0}]


def test_names_that_diffusers_would_pass_over_are_refused(tensors: Tensors, tmp_path: Path) -> None:
    pipe = make_tiny_pipeline()
    for change in (lambda name: name.removeprefix("transformer."), lambda name: f"unet.{name}"):
        file = save_lora({change(name): x for name, x in tensors.items()}, tmp_path / "style.safetensors")
        with pytest.raises(Refusal, match=r"must name layers as diffusers|which this model has not"):
            load_loras(pipe, [Lora(source=str(file))])
    assert not hasattr(pipe.transformer, "peft_config")


def test_xlabs_names_have_the_sizes_of_what_diffusers_makes_of_them() -> None:
    shape = FluxShape(num_layers=2, num_single_layers=2, attention_head_dim=4, num_attention_heads=2)
    layers = shape.lora_layers()
    tensors = {}
    for name, (outputs, inputs) in layers.items():
        if "processor" in name:
            layer = re.sub(r"(blocks)_(\d)_processor_", r"\1.\2.processor.", name)
            tensors |= {f"{layer}.down.weight": torch.zeros(3, inputs), f"{layer}.up.weight": torch.zeros(outputs, 3)}
    assert len(tensors) == 2 * (2 * 4 + 2 * 2)
    renamed = _convert_xlabs_flux_lora_to_diffusers(tensors)
    assert len(renamed) == 2 * (2 * 8 + 2 * 4)
    for name, tensor in renamed.items():
        layer, part = name.removeprefix("transformer.").split(".lora_")
        outputs, inputs = layers[layer.replace(".", "_")]
        assert tuple(tensor.shape) == ((3, inputs) if part == "A.weight" else (outputs, 3)), name


def test_xlabs_names_are_understood(model: Path, tmp_path: Path) -> None:
    down, up = torch.randn(3, 32), torch.randn(96, 3) / 3
    name = "double_blocks.0.processor.qkv_lora1"
    file = save_lora({f"{name}.down.weight": down, f"{name}.up.weight": up}, tmp_path / "style.safetensors")
    assert loras_of(model, f"{file}:-0.5") == (Lora(source=str(file), weight=-0.5),)
    ours, theirs = make_tiny_pipeline(), make_tiny_pipeline()
    load_loras(ours, [Lora(source=str(file), weight=-0.5)])
    with torch.no_grad():
        for layer, part in zip("qkv", up.chunk(3), strict=True):
            theirs.transformer.transformer_blocks[0].attn.get_submodule(f"to_{layer}").weight -= 0.5 * part @ down
    assert relative_error(run(ours, steps=1), run(theirs, steps=1)) < 1e-5
    wider = make_tiny_flux(tmp_path / "wider", heads=3)
    with pytest.raises(Refusal, match=r"qkv_lora1\.down\.weight must have 48 inputs, got 32"):
        loras_of(wider, str(file))
