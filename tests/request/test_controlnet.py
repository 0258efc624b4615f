"""`--controlnet` before anything is loaded: what it may name, what it is shown, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from diffusers import FluxControlNetModel, SD3ControlNetModel
from PIL import Image
from safetensors.torch import load_file, save_file

from clear_dist import hub
from clear_dist.comm.group import Group
from clear_dist.families.cards import CARDS
from clear_dist.families.flux.card import FLUX_DEV, FluxShape
from clear_dist.families.flux.controlnet_card import CONTROLNETS, FluxControlNetShape
from clear_dist.launch.env import Place
from clear_dist.options import Refusal
from clear_dist.request.flags import GenerateFlags, PlanFlags, UpscaleFlags
from clear_dist.request.request import Control, Request
from clear_dist.request.settle import choose, settle
from tests.tiny import make_tiny_flux
from tests.tiny_controlnet import make_tiny_controlnet

UNION_PRO, UNION_PRO_2 = (each.id for each in CONTROLNETS.on_hub)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, ControlNets of three kinds, one for another model and one of another class, and a picture."""
    folder = tmp_path_factory.mktemp("nets")
    make_tiny_flux(folder / "model")
    make_tiny_controlnet().save_pretrained(folder / "plain")
    make_tiny_controlnet(modes=3).save_pretrained(folder / "union")
    make_tiny_controlnet(hint=True).save_pretrained(folder / "pixels")
    wide = {"num_attention_heads": 3, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6), "joint_attention_dim": 24}
    blocks = {"num_layers": 1, "num_single_layers": 0, "pooled_projection_dim": 16}
    FluxControlNetModel(**wide, **blocks).save_pretrained(folder / "wide")
    SD3ControlNetModel(num_layers=1, num_attention_heads=2, attention_head_dim=8).save_pretrained(folder / "sd3")
    Image.new("RGB", (64, 32)).save(folder / "control.png")
    (folder / "text.png").write_text("none")
    return folder


def settled(folder: Path, net: str, **given: Any) -> Request:
    flags = {"model": str(folder / "model"), "control_image": folder / "control.png", "device": "cpu"} | given
    name = str(folder / net) if (folder / net).exists() else net
    return settle(GenerateFlags(controlnet=name, **flags), Place(), CARDS)[0]


def test_what_a_controlnet_is_shown(folder: Path) -> None:
    image = folder / "control.png"
    plain = settled(folder, "plain", control_scale=0.7, controlnet_window=4).control
    assert plain == Control(source=str(folder / "plain"), image=image, size=(32, 64), scale=0.7, mode=None, window=4)
    assert plain.without_folders().source == "plain" and plain.without_folders().image == Path("control.png")
    for word, mode in (("canny", 0), ("Tile", 1), ("2", 2)):
        control = settled(folder, "union", control_mode=word).control
        assert control is not None and (control.mode, control.scale, control.window) == (mode, 1.0, "full")
    assert settled(folder, "pixels").control is not None
    *_, notes = settle(
        GenerateFlags(model=str(folder / "model"), controlnet=str(folder / "plain"), control_image=image, device="cpu"),
        Place(),
        CARDS,
    )
    assert "warning: --control-image is 64x32 and is stretched to the shape of 128x128" in notes


def test_known_controlnets_are_checked_before_their_files_are_here(folder: Path) -> None:
    for word, source, mode in (("union-pro", UNION_PRO, "low_quality"), (UNION_PRO_2, UNION_PRO_2, None)):
        control = settled(folder, word, model=FLUX_DEV, control_mode=mode).control
        assert control is not None and (control.source, control.mode) == (source, 6 if mode else None)
    assert settled(folder, "someone/net@v1", model=FLUX_DEV, control_mode="9").control is not None
    with pytest.raises(Refusal, match=r"must fit model: joint_attention_dim must be 24, got 4096 in Shakker-Labs"):
        settled(folder, "union-pro", control_mode="gray")
    for known, billions in zip(CONTROLNETS.on_hub, (3.3, 2.1), strict=True):
        tensors = CONTROLNETS.shape_of(known.config, known.id).tensors()
        numbers = 0
        for shape in tensors.values():
            size = 1
            for side in shape:
                size *= side
            numbers += size
        assert numbers / 1e9 == pytest.approx(billions, abs=0.1)


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "no mode": (
        "union",
        {},
        r"must be canny \(0\), tile \(1\), depth \(2\), or a number below 3, .*got none; nearest: c",
    ),
    "a mode it has not": ("union", {"control_mode": "gray"}, r"below 3, for the union .*got gray \(5\); nearest: 2"),
    "a number": ("union", {"control_mode": "12"}, "got 12; nearest: 2"),
    "another word": ("union", {"control_mode": "grey"}, "must be one of canny, .*got 'grey'; nearest: gray"),
    "a mode for none": ("plain", {"control_mode": "tile"}, "is for unions, got 1 for .*nearest: leave it out"),
    "another width": ("wide", {}, r"must fit model: channels must be 32, got 48 in .*wide; is it for another model\?"),
    "another class": ("sd3", {}, "must be FluxControlNetModel, got SD3ControlNetModel in"),
    "another family": (
        "union-pro",
        {"model": "sd3.5-large", "control_mode": "gray"},
        "got .*nearest: --model flux-dev",
    ),
    "a file": ("control.png", {}, "--controlnet must be union-pro, .*got the file"),
    "a slip": ("unionpro", {}, "there is no 'unionpro'; nearest: union-pro"),
    "no picture": (
        "plain",
        {"control_image": None},
        "--controlnet needs a picture, got .*; nearest: --control-image FILE",
    ),
    "an unreadable picture": ("plain", {"control_image": Path("nowhere.png")}, "must be a file that can be read, got"),
    "a scale": ("plain", {"control_scale": 2.5}, "--control-scale must be a number from 0 to 2, got 2.5; nearest: 2"),
    "a window": ("plain", {"controlnet_window": 0}, "--controlnet-window must be from 1 to 8192, got 0; nearest: 1"),
    "a start": ("plain", {"image": Path("a.png")}, "either --controlnet or --image"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_requests_are_refused_on_a_line(folder: Path, what: str) -> None:
    net, given, message = WRONG[what]
    with pytest.raises(Refusal, match=message) as refused:
        settled(folder, net, **given)
    assert "\n" not in str(refused.value)


def test_flags_that_are_for_controlnets_need_one(folder: Path) -> None:
    for name, value in (("control_image", folder / "text.png"), ("control_scale", 0.5), ("controlnet_window", 8)):
        with pytest.raises(Refusal, match=rf"--{name.replace('_', '-')} is for ControlNets, got .* alone; nearest"):
            GenerateFlags(**{name: value})
    assert UpscaleFlags(images=["a.png"], controlnet="union-pro", control_mode="tile").control_image is None
    plan = PlanFlags(model=str(folder / "model"), controlnet=str(folder / "union"))
    request, *_ = choose(plan, Place(), CARDS, device="cpu", gpus=())
    assert request.control is not None and request.control.mode is None


@pytest.mark.parametrize("net", ["plain", "union", "pixels", "wide"])
def test_tensors_by_configuration_are_those_of_diffusers(folder: Path, net: str) -> None:
    model = FluxControlNetModel.from_pretrained(folder / net)
    shape = FluxControlNetShape.of(model.config, "config.json")
    assert shape.tensors() == {name: tuple(x.shape) for name, x in model.state_dict().items()}
    assert shape.modes == model.config.num_mode
    assert (shape.misfit(FluxShape(num_attention_heads=3, attention_head_dim=16)) is None) is False


def test_a_controlnet_of_the_hub_is_compared_once_it_is_fetched(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before anything is loaded; the hub is played by a folder."""
    monkeypatch.setattr(hub, "fetch", lambda wants, quiet: None)
    monkeypatch.setattr(hub, "cached", lambda want: folder / "union")
    request = settled(folder, "someone/net@v1", control_mode="2")
    group = Group.create("cpu")
    try:
        want = hub.wanted_controlnet(request)
        assert want is not None and (want.repository, want.revision, want.needed) == (
            "someone/net",
            "v1",
            "config.json",
        )
        assert hub.locate(request, group, CARDS, local_rank=0).control == request.control
        assert hub.local_controlnet(request) == folder / "union"
        monkeypatch.setattr(hub, "cached", lambda want: folder / "plain")
        with pytest.raises(Refusal, match="--control-mode is for unions, got 2 for"):
            hub.locate(request, group, CARDS, local_rank=0)
        damaged = tmp_path / "damaged"
        make_tiny_controlnet(modes=3).save_pretrained(damaged)
        file = damaged / "diffusion_pytorch_model.safetensors"
        save_file({name: x for name, x in load_file(file).items() if "mode" not in name}, file)
        monkeypatch.setattr(hub, "cached", lambda want: damaged)
        with pytest.raises(Refusal, match=r"lacks controlnet_mode_embedder\.weight"):
            hub.locate(request, group, CARDS, local_rank=0)
    finally:
        group.close()
