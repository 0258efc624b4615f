"""`clear-dist evaluate` on folders of pictures and small random networks, against the libraries called by hand."""

import csv
import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchmetrics.functional import image as metrics
from torchmetrics.functional.multimodal.clip_score import _clip_score_update
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from transformers import AutoModel, AutoTokenizer, CLIPModel

from clear_dist.commands.app import run
from clear_dist.evaluate.run import in_batches
from clear_dist.request.compared import Sample
from tests.evaluate.feature_networks import make_alexnet, make_clip, make_dino, make_inception, processor_of

COUNT = 101
"""As many as IS needs, and one that is left over from whole batches."""


def write(folder: Path, pictures: np.ndarray, ending: str = ".png") -> Path:
    folder.mkdir()
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"picture-{number:03d}{ending}")
    return folder


@pytest.fixture(scope="module")
def sets() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng()
    smooth = generator.integers(0, 256, (COUNT, 6, 8, 3), dtype=np.uint8).repeat(16, 1).repeat(16, 2)
    noisy = smooth + generator.normal(0, generator.uniform(1, 40, (COUNT, 1, 1, 1)), smooth.shape)
    return noisy.clip(0, 255).astype(np.uint8), smooth


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sets: tuple[np.ndarray, np.ndarray]) -> Path:
    monkeypatch.chdir(tmp_path)
    pictures, others = sets
    write(tmp_path / "pictures", pictures)
    write(tmp_path / "others", others)
    return tmp_path


def report(*arguments: str) -> dict[str, Any]:
    assert run(["evaluate", *arguments, "--report", "report.json", "--device", "cpu"]) == 0
    return json.loads(Path("report.json").read_text())


def as_tensors(*sets: np.ndarray) -> list[Tensor]:
    """Bytes [N, 3, H, W]."""
    return [torch.from_numpy(each).movedim(-1, 1) for each in sets]


@pytest.mark.usefixtures("folders")
def test_figures_without_networks(sets: tuple[np.ndarray, np.ndarray], capsys: pytest.CaptureFixture[str]) -> None:
    found = report("pictures", "--against", "others", "--batch", "7")
    drawn, expected = as_tensors(*sets)
    given: dict[str, Any] = {"data_range": 1.0, "reduction": "none"}
    psnr = metrics.peak_signal_noise_ratio(drawn.double() / 255, expected.double() / 255, dim=(1, 2, 3), **given)
    ssim = metrics.structural_similarity_index_measure(drawn.float() / 255, expected.float() / 255, **given)
    assert found["figures"]["psnr"]["value"] == pytest.approx(float(psnr.mean()), rel=1e-6)
    assert found["figures"]["ssim"]["value"] == pytest.approx(float(ssim.mean()), abs=1e-6)
    of_each = [each["psnr"] for each in found["of_each"].values()]
    assert of_each == pytest.approx(psnr.tolist(), rel=1e-6) and found["count"] == COUNT
    notes = {name: each["note"] for name, each in found["figures"].items() if each["value"] is None}
    assert notes["ms_ssim"] == "needs pictures of at least 161 px" and notes["fid"] == "needs --inception FILE"
    assert set(notes) == {"ms_ssim", "fid", "lpips", "clip_i", "dino", "clip_t", "is", "rmse", "gflops"}
    rows = list(csv.DictReader(Path("report.csv").read_text().splitlines()))
    assert [float(row["psnr"]) for row in rows] == of_each and rows[7]["name"] == "picture-007"
    table = capsys.readouterr().out
    assert Path("report.md").read_text() == table and f"{float(psnr.mean()):.2f}" in table
    with Image.open("report.png") as sheet:
        assert sheet.size == (2 * 128 + 3 * 8, 3 * (96 + 20 + 8))
        best = int(psnr.argmax())
        assert np.array_equal(np.array(sheet)[20:116, 8:136], sets[0][best])
        assert np.array_equal(np.array(sheet)[20:116, 144:272], sets[1][best])


def test_figures_of_feature_networks(folders: Path, sets: tuple[np.ndarray, np.ndarray]) -> None:
    clip, dino = make_clip(folders / "clip"), make_dino(folders / "dino")
    inception, lpips = make_inception(folders / "inception.pt"), make_alexnet(folders / "alex.safetensors")
    captions = [f"picture {number}, an example" for number in range(COUNT)]
    (folders / "prompts.txt").write_text("\n".join(captions))
    networks = ("--clip", "clip", "--dino", "dino", "--inception", str(inception), "--lpips", str(lpips))
    found = report("pictures", "--against", "others", "--prompts", "prompts.txt", *networks, "--batch", "16")
    values = {name: each["value"] for name, each in found["figures"].items()}
    drawn, expected = as_tensors(*sets)
    with torch.inference_mode():
        assert values["clip_i"] == pytest.approx(by_torchmetrics(clip, drawn, list(expected)), rel=1e-6)
        assert values["clip_t"] == pytest.approx(by_torchmetrics(clip, drawn, captions), rel=1e-5)
        model = AutoModel.from_pretrained(dino).eval()
        seen = [
            model(**processor_of(dino)(images=list(x), return_tensors="pt")).pooler_output for x in (drawn, expected)
        ]
        cosine = torch.nn.functional.cosine_similarity(*(x.double() for x in seen))
        assert values["dino"] == pytest.approx(100 * float(cosine.mean()), rel=1e-6)
        fid, score = by_hand(torch.jit.load(str(inception)), drawn, expected)
        assert values["fid"] == pytest.approx(fid, rel=1e-5, abs=1e-6) and values["is"] == pytest.approx(
            score, rel=1e-6
        )
        pair = (2 * x.float() / 255 - 1 for x in (drawn, expected))
        assert values["lpips"] == pytest.approx(float(perceived(lpips, *pair).mean()), rel=1e-6)


def by_torchmetrics(folder: Path, pictures: Tensor, others: Any) -> float:
    """CLIP score, before torchmetrics makes 0 of what is below."""
    model = CLIPModel.from_pretrained(folder).eval()

    class Plain(torch.nn.Module):
        """What torchmetrics 1.9 expects: tensors, as transformers before 5.0 gave."""

        config = model.config

        def get_image_features(self, pixels: Tensor) -> Tensor:
            return model.get_image_features(pixel_values=pixels).pooler_output

        def get_text_features(self, *given: Tensor) -> Tensor:
            return model.get_text_features(*given).pooler_output

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def processor(text: Any = None, images: Any = None, **given: Any) -> Any:
        if text is None:
            return processor_of(folder)(images=images, return_tensors="pt")
        return tokenizer(text, truncation=True, max_length=20, **given)

    return float(_clip_score_update(list(pictures), others, Plain(), processor)[0].double().mean())


def by_hand(network: Any, pictures: Tensor, others: Tensor) -> tuple[float, float]:
    class Features(torch.nn.Module):
        num_features = 6

        def forward(self, x: Tensor) -> Tensor:
            return network(x, return_features=True)

    fid = FrechetInceptionDistance(feature=Features())
    fid.update(pictures, real=False)
    fid.update(others, real=True)

    class Classes(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return network(x, return_features=True) @ network.output.weight.T * 9

    score = InceptionScore(feature=Classes())
    score.update(pictures)
    torch.manual_seed(0)
    return float(fid.compute()), float(score.compute()[0])


def perceived(file: Path, drawn: Tensor, expected: Tensor) -> Tensor:
    """LPIPS as its article has it (Zhang et al. 2018, Eq. 1)."""
    from safetensors.torch import load_file

    weights = load_file(file)
    shift, scale = (torch.tensor(x)[:, None, None] for x in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    x, total = torch.cat([drawn, expected]).sub(shift).div(scale), torch.zeros(())
    for layer, number in enumerate((0, 3, 6, 8, 10)):
        if number in (3, 6):
            x = torch.nn.functional.max_pool2d(x, 3, 2)
        stride, padding = {0: (4, 2), 3: (1, 2)}.get(number, (1, 1))
        weight, bias = (weights[f"features.{number}.{name}"] for name in ("weight", "bias"))
        x = torch.nn.functional.conv2d(x, weight, bias, stride, padding).relu()
        one, other = (x / (1e-8 + x.square().sum(1, keepdim=True)).sqrt()).chunk(2)
        head = weights[f"lin{layer}.model.1.weight"]
        total = total + ((one - other).square() * head.reshape(1, -1, 1, 1)).sum(1).mean((1, 2))
    return total


@pytest.mark.usefixtures("folders")
def test_rmse_to_conditions(folders: Path, sets: tuple[np.ndarray, np.ndarray]) -> None:
    gray = np.stack([np.array(Image.fromarray(each).convert("L").convert("RGB")) for each in sets[1]])
    write(folders / "conditions", gray)
    values = {}
    for condition in ("same", "gray"):
        found = report("pictures", "--conditions", "conditions", "--condition", condition)
        values[condition] = found["figures"]["rmse"]["value"]
    luma = np.stack([np.array(Image.fromarray(each).convert("L")) for each in sets[0]]).astype(float)
    errors = np.sqrt(np.square(sets[0] / 255 - gray / 255).mean((1, 2, 3)))
    assert values["same"] == pytest.approx(errors.mean(), rel=1e-6)
    errors = np.sqrt(np.square(luma / 255 - gray[..., 0] / 255).mean((1, 2)))
    assert values["gray"] == pytest.approx(errors.mean(), abs=1e-3)  # Pillow's luma is in whole numbers
    assert (
        found["figures"]["psnr"] == {"value": None, "note": "needs --against FOLDER"}
        and not Path("report.png").exists()
    )


@pytest.mark.usefixtures("folders")
def test_a_vit_and_too_few_pictures(folders: Path) -> None:
    for folder in (folders / "pictures", folders / "others"):
        for file in sorted(folder.iterdir())[5:]:
            file.unlink()
    make_dino(folders / "vit", "vit")
    make_inception(folders / "inception.pt")
    found = report("pictures", "--against", "others", "--dino", "vit", "--inception", "inception.pt", "--window", "3")
    assert -100 <= found["figures"]["dino"]["value"] <= 100
    assert found["figures"]["fid"] == {"value": None, "note": "needs 7 pictures, got 5"}
    assert found["figures"]["is"] == {"value": None, "note": "needs 100 pictures, got 5"}
    tokens = list(product(range(6), range(8)))
    near = sum((a - c) ** 2 + (b - d) ** 2 < 9 for (a, b), (c, d) in product(tokens, tokens))
    assert found["figures"]["gflops"]["value"] == pytest.approx(4 * 3072 * (512 * (512 + 96) + near) / 1e9)


@pytest.mark.usefixtures("folders")
def test_equal_pictures_have_no_mean_psnr() -> None:
    found = report("others", "--against", "others")["figures"]
    assert found["psnr"] == {"value": None, "note": f"infinite: {COUNT} of {COUNT} pictures equal theirs"}
    assert found["ssim"]["value"] == pytest.approx(1, abs=1e-4)


def test_batches_hold_pictures_of_one_size() -> None:
    sizes = [(1, 2)] * 5 + [(3, 4)] * 2
    samples = [Sample(name=str(n), size=size, picture=Path(str(n))) for n, size in enumerate(sizes)]
    assert [[each.name for each in batch] for batch in in_batches(samples, 3)] == [
        ["0", "1", "2"],
        ["3", "4"],
        ["5", "6"],
    ]
