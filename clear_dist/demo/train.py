"""Train the embedded demo model: renders -> VAE -> transformer and text encoders -> the VAE's decoder -> export.

    python -m clear_dist.demo.train --output DIR [--start WEIGHTS] [--resume] [--stage vae]

Every stage keeps checkpoints and figures in DIR and goes on where it stopped; a finished stage is only loaded. With
--start, weights begin as in that folder, and its encoder stays as it is: latents are what the transformer knows. The
files for windows are made from the result by `clear-dist distill`.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from clear_dist.demo import WEIGHTS, data, pipeline, train_vae
from clear_dist.demo.train_transformer import LatentSet, train_transformer

MINUTES = {"vae": 28.0, "transformer": 105.0, "decoder": 12.0}
STAGES = (*MINUTES, "export")


def main() -> None:
    arguments = _arguments()
    output, start, last = arguments.output, arguments.start, STAGES.index(arguments.stage)
    if (output / "figures.jsonl").exists() and not arguments.resume:
        raise SystemExit(f"{output} holds an earlier run: pass --resume to go on with it, or choose another folder")
    torch.set_num_threads(arguments.threads)
    scenes = {name: data.load_or_render(output / "renders", name) for name in data.SETS}
    pictures = {name: scenes[name][0] for name in ("native", "large", "held_out")}
    vae = train_vae.begin(start)
    if not start:
        vae = train_vae.train_vae(output / "vae.pt", vae, pictures, minutes=MINUTES["vae"])
    if last == 0:
        return
    sets = _latent_sets(output, vae, scenes)
    validation = {256: sets.pop("held_out"), 512: sets.pop("held_out_large")}
    models = train_transformer(output, list(sets.values()), validation, MINUTES["transformer"], start)
    if last == 1:
        return
    vae.encoder.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    vae = train_vae.train_vae(output / "decoder.pt", vae, pictures, minutes=MINUTES["decoder"])
    if last == 2:
        return
    parts = pipeline.assemble(vae, models["transformer"], models["text_encoder"], models["text_encoder_2"])
    pipeline.export(parts, output / "weights")
    rows = [json.loads(line) for line in (output / "figures.jsonl").read_text().splitlines()]
    (output / "training.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def _latent_sets(output: Path, vae: AutoencoderKL, scenes: dict[str, data.Scenes]) -> dict[str, LatentSet]:
    """Latents of each set of pictures, and how they are shown; a new VAE gets the scale and shift of "native"."""
    latents = {name: _cached_latents(output, name, vae, scenes[name][0]) for name in data.SETS}
    shown = {
        name: functools.partial(LatentSet, latents=latents[name], landscapes=scenes[name][1]) for name in data.SETS
    }
    return {
        "native": shown["native"](odds=0.6, batch=16, side=16),
        "large": shown["large"](odds=0.3, batch=4, side=32),
        "largest": shown["largest"](odds=0.1, batch=4, side=32, most_noise=0.9),
        "held_out": shown["held_out"](odds=0.0, batch=16, side=16),
        "held_out_large": shown["held_out_large"](odds=0.0, batch=4, side=32),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for renders, checkpoints, figures, weights")
    parser.add_argument("--start", type=Path, help=f"folder of weights to begin with, such as {WEIGHTS.name}/")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --output")
    parser.add_argument("--stage", choices=STAGES, default="export", help="stop after this stage")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def _cached_latents(output: Path, name: str, vae: AutoencoderKL, pictures: np.ndarray) -> torch.Tensor:
    """Normalised latents in float16, encoded once; the first, "native", choose a new VAE's scale and shift."""
    path = output / f"latents_{name}.pt"
    if not path.exists():
        latents = train_vae.encode_all(vae, pictures)
        statistics = {"scale": vae.config.scaling_factor, "shift": vae.config.shift_factor}
        if statistics == {"scale": 1.0, "shift": 0.0}:
            statistics = {"scale": 1 / latents.std().item(), "shift": latents.mean().item()}
        latents = ((latents - statistics["shift"]) * statistics["scale"]).half()
        torch.save({"latents": latents, **statistics}, path)
    state = torch.load(path, weights_only=True)
    vae.register_to_config(scaling_factor=state["scale"], shift_factor=state["shift"])
    return state["latents"]


if __name__ == "__main__":
    main()
