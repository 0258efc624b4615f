"""Train the embedded demo model: renders -> VAE -> transformer and text encoders -> CLEAR -> export.

    python -m clear_dist.demo.train --output DIR [--resume] [--stage vae]

Every stage keeps checkpoints and figures in DIR and goes on where it stopped; a finished stage is only loaded.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from clear_dist.demo import CLEAR_WEIGHTS, data, pipeline, train_vae
from clear_dist.demo.train_clear import train_clear
from clear_dist.demo.train_transformer import LatentSet, train_transformer

TRAINING_SCENES, HELD_OUT_SCENES = 8000, 96
LATENT_SCENES = 6000  # of the training scenes, those that the transformer sees
MINUTES = {"vae": 32.0, "transformer": 160.0, "clear": 4.0}
STAGES = (*MINUTES, "export")


def main() -> None:
    arguments = _arguments()
    output, last = arguments.output, STAGES.index(arguments.stage)
    if (output / "figures.jsonl").exists() and not arguments.resume:
        raise SystemExit(f"{output} holds an earlier run: pass --resume to go on with it, or choose another folder")
    torch.set_num_threads(arguments.threads)
    renders = output / "renders"
    pictures, landscapes = data.load_or_render(renders, "training", data.TRAINING_SEED, TRAINING_SCENES)
    held_out, held_out_landscapes = data.load_or_render(renders, "held_out", data.HELD_OUT_SEED, HELD_OUT_SCENES)
    vae = train_vae.train_vae(output, pictures, held_out, MINUTES["vae"])
    if last == 0:
        return
    latents = _cached_latents(output, "training", vae, pictures[:LATENT_SCENES], fit=True)
    native = LatentSet(latents, landscapes[:LATENT_SCENES])
    validation = LatentSet(_cached_latents(output, "held_out", vae, held_out), held_out_landscapes)
    large = []
    for size, count in data.LARGE.items():
        large_pictures, shown = data.load_or_render(renders, f"large_{size}", data.LARGE_SEED + size, count, size)
        large.append(LatentSet(_cached_latents(output, f"large_{size}", vae, large_pictures), shown))
    models = train_transformer(output, native, large, validation, MINUTES["transformer"])
    if last == 1:
        return
    clear = train_clear(output, models, native, large, validation, MINUTES["clear"])
    if last == 2:
        return
    parts = pipeline.assemble(vae, models["transformer"], models["text_encoder"], models["text_encoder_2"])
    pipeline.export(parts, output / "weights", {CLEAR_WEIGHTS.name: clear})
    rows = [json.loads(line) for line in (output / "figures.jsonl").read_text().splitlines()]
    (output / "training.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for renders, checkpoints, figures, weights")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --output")
    parser.add_argument("--stage", choices=STAGES, default="export", help="stop after this stage")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def _cached_latents(
    output: Path, name: str, vae: AutoencoderKL, pictures: np.ndarray, fit: bool = False
) -> torch.Tensor:
    """Normalised latents in float16, encoded once; `fit` chooses the VAE's scale and shift from these pictures."""
    path = output / f"latents_{name}.pt"
    if not path.exists():
        latents = train_vae.encode_all(vae, pictures)
        statistics = {"scale": 1 / latents.std().item(), "shift": latents.mean().item()}
        if not fit:
            statistics = {"scale": vae.config.scaling_factor, "shift": vae.config.shift_factor}
        latents = ((latents - statistics["shift"]) * statistics["scale"]).half()
        torch.save({"latents": latents, **statistics}, path)
    state = torch.load(path, weights_only=True)
    vae.register_to_config(scaling_factor=state["scale"], shift_factor=state["shift"])
    return state["latents"]


if __name__ == "__main__":
    main()
