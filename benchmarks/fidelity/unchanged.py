"""Does a change leave what commands draw and say as it was, to the bit and to the word?

    python -m benchmarks.fidelity.unchanged record before.json         in the old checkout
    python -m benchmarks.fidelity.unchanged compare before.json        in the new one, on the same machine

Twelve commands with the embedded model, and some sixty wrong requests: exit status, lines, latents, pixels, metadata
and the report's settings. Times are left out; one thread per rank, so that sums are added up in one order.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

CHECKOUT = Path(__file__).parents[2]
DEMO = CHECKOUT / "clear_dist" / "demo" / "weights"
PROMPT = "night over snowy mountains, moon on the right"
SMALL = [PROMPT, "--res", "128", "--steps", "4", "--seed", "7"]
DRAWN = {
    "sync": ["generate", *SMALL, "--nproc", "2"],
    "stale": ["generate", *SMALL, "--nproc", "2", "--schedule", "stale", "--warmup-steps", "2"],
    "average": ["generate", *SMALL, "--nproc", "3", "--text-attention", "average", "--text-tokens", "sharded"],
    "exact": ["generate", *SMALL, "--nproc", "3", "--text-attention", "exact"],
    "full": ["generate", *SMALL, "--nproc", "2", "--window", "full", "--true-cfg-scale", "1"],
    "cascade": ["generate", *SMALL[:1], "--res", "320", "--base-res", "128", "--steps", "4", "--seed", "7",
                "--nproc", "2", "--save-stages"],
    "upscale": ["upscale", "sync.png", "--res", "256", "--base-res", "128", "--upscale-steps", "3", "--seed", "8",
                "--nproc", "2"],
    "down-sampled": ["generate", *SMALL, "--nproc", "2", "--text-attention", "exact",
                     "--clear-weights", "clear_local_8_down_2.safetensors"],
    "lora": ["generate", *SMALL, "--nproc", "2", "--lora", "lora.safetensors:0.7"],
    "int8": ["generate", *SMALL, "--nproc", "2", "--int8"],
    "plan": ["plan", "--res", "8192", "--nproc", "4", "--gpu", "a100-40", "--model", "black-forest-labs/FLUX.1-dev"],
    "plan-refused": ["plan", "--res", "16384", "--nproc", "2", "--gpu", "rtx4090", "--int8", "--schedule", "stale"],
}  # fmt: skip
WRONG = [
    ["generate", "--res", "500"],
    ["generate", "--res", "8"],
    ["generate", "--res", "256", "--height", "128"],
    ["generate", "--steps", "many"],
    ["generate", "--steps", "0"],
    ["generate", "--guidance-scale", "nan"],
    ["generate", "--text-attention", "averge"],
    ["generate", "--text-attention", "average", "--window", "full"],
    ["generate", "--text-tokens", "shared"],
    ["generate", "--text-tokens", "sharded", "--schedule", "stale"],
    ["generate", "--schedule", "async"],
    ["generate", "--warmup-steps", "-1"],
    ["generate", "--window", "0"],
    ["generate", "--window", "-3"],
    ["generate", "--window", "wide"],
    ["generate", "--window", "9999"],
    ["generate", "--window", "1" * 90],
    ["generate", "--window", "5"],
    ["generate", "--attention-backend", "fast"],
    ["generate", "--attention-backend", "flex", "--device", "cpu", "--res", "128", "--nproc", "1", "--seed", "9"],
    ["generate", "--float8", "--int8"],
    ["generate", "--float8"],
    ["generate", "--dtype", "int4"],
    ["generate", "--device", "tpu"],
    ["generate", "--device", "cuda"],
    ["generate", "--nproc", "0"],
    ["generate", "--nproc", "64", "--res", "128"],
    ["generate", "--shard-weights", "--nproc", "8", "--res", "512", "--base-res", "64"],
    ["generate", "--seed", "-4"],
    ["generate", "--num-images", "0"],
    ["generate", "--cascade", "on"],
    ["generate", "--base-res", "512", "--res", "256"],
    ["generate", "--strength", "2"],
    ["generate", "--ntk-factor", "0.5"],
    ["generate", "--max-sequence-length", "600"],
    ["generate", "--model", "nowhere"],
    ["generate", "--model", "./nowhere"],
    ["generate", "--model", "a file"],
    ["generate", "--clear-weights", "nothing.safetensors"],
    ["generate", "--clear-weights", "weights.bin"],
    ["generate", "--clear-weights", "owner/name:file.txt"],
    ["generate", "--clear-weights", "Huage001/CLEAR:clear_local_9.safetensors"],
    ["generate", "--clear-weights", "lora.safetensors"],
    ["generate", "--clear-weights", "clear_local_8_down_2.safetensors", "--window", "16"],
    ["generate", "--model", "black-forest-labs/FLUX.1-dev", "--window", "12"],
    ["generate", "--model", "black-forest-labs/FLUX.1-dev", "--lora", "lora.safetensors"],
    ["generate", "--lora", "nothing.safetensors"],
    ["generate", "--lora", "lora.safetensors:99"],
    ["generate", "--lora", "clear_local_8_down_2.safetensors"],
    ["generate", "--output", "picture.gif"],
    ["generate", "--output", "nowhere/picture.png"],
    ["generate", "--latents-out", "latents.pt"],
    ["generate", "--report", "report.txt"],
    ["generate", "--profile", "profile.txt"],
    ["generate", "--preview-every", "0"],
    ["generate", "--prompts", "nothing.txt"],
    ["generate", "--prompts", "empty.txt"],
    ["generate", "a", "--prompts", "empty.txt"],
    ["generate", "a", "b"],
    ["generate", "--colour", "red"],
    ["generate", "--res"],
    ["upscale"],
    ["upscale", "nothing.png"],
    ["upscale", "empty.txt"],
    ["upscale", "sync.png", "--res", "64"],
    ["plan", "--gpu", "h1000"],
    ["plan", "--link", "string"],
    ["plan", "--model", "owner/name"],
    ["plan", "--window", "full", "--text-attention", "average"],
    ["verify", "--nproc", "0"],
    ["verify", "--json", "report.txt"],
    ["verify", "--device", "cuda"],
    ["draw"],
    [],
]  # fmt: skip
"""Flags that are refused, in one line, before anything is loaded."""
NOTED = [
    ["generate", "--hoist-modulation", "--offload", "--shard-weights", "--guidance-scale", "4", "--strength", "0.5"],
    ["generate", "--schedule", "stale", "--text-attention", "exact", "--text-tokens", "replicated", "--nproc", "1"],
    ["generate", "--warmup-steps", "3", "--negative-prompt", "red zebra", "--true-cfg-scale", "1", "--window", "4"],
    ["generate", "a red zebra", "--res", "1536", "--cascade", "off", "--revision", "main", "--window", "full"],
    ["generate", "--window", "full", "--clear-weights", "none", "--attention-backend", "tiled"],
]
"""Flags without effect, each of which is told."""


def make_inputs(folder: Path) -> None:
    """A CLEAR checkpoint with down-sampled keys, a LoRA and an empty file."""
    clear = load_file(DEMO / "clear_local_8.safetensors")
    generator = torch.Generator().manual_seed(0)
    layers = sorted({name.partition(".attn.")[0] for name in clear})
    spatial = {
        f"{layer}.attn.processor.spatial_weight": 0.25 + 0.05 * torch.randn(1, 1, 1, 2, 1, 2, 1, generator=generator)
        for layer in layers
    }
    save_file(clear | spatial, folder / "clear_local_8_down_2.safetensors")
    lora = {}
    for name, weight in clear.items():
        if name.endswith("to_q.weight"):
            layer = f"transformer.{name.removesuffix('.weight')}"
            lora[f"{layer}.lora_A.weight"] = torch.randn(4, weight.shape[1], generator=generator) / 16
            lora[f"{layer}.lora_B.weight"] = torch.randn(weight.shape[0], 4, generator=generator) / 2
    save_file(lora, folder / "lora.safetensors")
    (folder / "empty.txt").write_text("")
    (folder / "a file").write_text("no folder")


def run(arguments: list[str], folder: Path) -> dict[str, Any]:
    """Exit status and lines of one command."""
    environment = os.environ | {
        "PYTHONPATH": str(CHECKOUT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "120",
    }
    command = [sys.executable, "-c", "from clear_dist.cli import main; main()", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    return {"status": done.returncode, "stdout": told(done.stdout, folder), "stderr": told(done.stderr, folder)}


def told(text: str, folder: Path) -> list[str]:
    """Lines without what differs from run to run: times, amounts of free memory, and where things lie."""
    for place, name in (
        (folder, "FOLDER"),
        (DEMO, "DEMO"),
        (CHECKOUT, "CHECKOUT"),
        (Path(tempfile.gettempdir()), "TMP"),
    ):
        text = text.replace(str(place), name)
    text = re.sub(r"seconds=[\d.]+", "seconds=", text)
    text = re.sub(r"the [\d.]+ GB that are free", "the GB that are free", text)
    return text.splitlines()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def pictures(folder: Path, name: str) -> dict[str, Any]:
    """Pixels and metadata of all that a command wrote."""
    found = {}
    for file in sorted(folder.glob(f"{name}*.png")):
        with Image.open(file) as image:
            texts = {key: str(value) for key, value in image.info.items() if isinstance(value, str)}
            settings = json.loads(texts.pop("settings", "{}"))
            found[file.name] = {"pixels": digest(image.convert("RGB").tobytes()), "metadata": texts | settings}
    return found


def draw(name: str, arguments: list[str], folder: Path) -> dict[str, Any]:
    if arguments[0] == "plan":
        return run([*arguments, "--json"], folder) | {"table": run(arguments, folder)}
    written = ["--output", f"{name}.png", "--latents-out", f"{name}.safetensors", "--report", f"{name}.json"]
    result = run([*arguments, *written], folder) | {"pictures": pictures(folder, name)}
    if result["status"] == 0:
        latents = load_file(folder / f"{name}.safetensors")["latents"]
        report = json.loads((folder / f"{name}.json").read_text())
        kept = ("schema", "seed", "world_size", "settings", "clear_weights", "grid", "stripes")
        counted = [{key: value for key, value in rank.items() if key != "seconds_waiting"} for rank in report["comm"]]
        result["latents"] = digest(latents.contiguous().numpy().tobytes())
        result["report"] = json.loads("\n".join(told(json.dumps({key: report[key] for key in kept}), folder)))
        result["comm"] = counted
        result["keys"] = sorted(report)
    return result


def record() -> dict[str, Any]:
    """Results of all commands, by name or words."""
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder)
        for drawn, arguments in DRAWN.items():
            results[drawn] = draw(drawn, arguments, folder)
            print(drawn, results[drawn]["status"], file=sys.stderr, flush=True)
        for arguments in WRONG:
            results[" ".join(arguments) or "nothing"] = run(arguments, folder)
        for arguments in NOTED:
            results[" ".join(arguments)] = run([*arguments, "--steps", "1", "--seed", "9", "--output", "n.png"], folder)
    return results


def differences(before: Any, after: Any, where: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            line
            for key in {**before, **after}
            for line in differences(before.get(key, "(none)"), after.get(key, "(none)"), f"{where}/{key}")
        ]
    return [] if before == after else [f"{where}\n  before: {before}\n  after:  {after}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    given = parser.parse_args()
    results = record()
    if given.what == "record":
        given.file.write_text(json.dumps(results, indent=1) + "\n")
        return
    found = differences(json.loads(given.file.read_text()), results)
    print("\n".join(found) or f"{len(results)} commands: the same")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
