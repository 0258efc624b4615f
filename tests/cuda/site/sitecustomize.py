"""What depends on numbers that no kernel of a null GPU has computed is told here, as modules are loaded."""

import importlib.abc
import importlib.util
import os
import sys
from typing import Any

GRIDS: dict[int, tuple[int, int]] = {}
"""Height and width in tokens by their number: positions on the GPU are all zero."""


def _grid(family: Any, inputs: Any) -> tuple[int, int]:
    return GRIDS[inputs["img_ids"].shape[-2]]


REPLACED: dict[str, dict[str, Any]] = {
    "clear_dist.families.flux.transformer": {"Flux.grid_of": _grid},
    "clear_dist.families.flux2.transformer": {"Flux2.grid_of": _grid},
    "clear_dist.weights.hoisted": {"Table.find": lambda table, embedding: 0},
    "clear_dist.engine.agreement": {
        "sampled": lambda tensors: iter(()),
        "schedule_of": lambda scheduler: type(scheduler).__name__,
        "checksum": lambda x: (0, 0),
        "shadow": lambda x: [0.0] * 4,
    },
}
"""Functions of ours that read numbers, by module and name."""


def _ours(module: Any) -> None:
    for name, by in REPLACED[module.__name__].items():
        where, _, last = name.rpartition(".")
        setattr(getattr(module, where) if where else module, last, by)


def _cudnn(torch: Any) -> None:
    torch.backends.cuda.enable_cudnn_sdp(False)  # its graphs are no function that a stub could be


def _positions(module: Any) -> None:
    for pipeline in {each for each in vars(module).values() if hasattr(each, "_prepare_latent_image_ids")}:
        stock = pipeline._prepare_latent_image_ids

        def noted(batch: int, height: int, width: int, *rest: Any, stock: Any = stock, **named: Any) -> Any:
            GRIDS[height * width] = (height, width)
            return stock(batch, height, width, *rest, **named)

        pipeline._prepare_latent_image_ids = staticmethod(noted)


def _latent_positions(module: Any) -> None:
    stock = module.Flux2Pipeline._prepare_latent_ids

    def noted(latents: Any) -> Any:
        height, width = latents.shape[2:]
        GRIDS[height * width] = (height, width)
        return stock(latents)

    module.Flux2Pipeline._prepare_latent_ids = staticmethod(noted)


def _first_step(module: Any) -> None:
    """Pipelines that do not say which step is the first have it looked up among timesteps on the GPU."""
    module.FlowMatchEulerDiscreteScheduler.index_for_timestep = lambda *asked: 0


AFTER = dict.fromkeys(REPLACED, _ours) | {
    "torch": _cudnn,
    "diffusers.schedulers.scheduling_flow_match_euler_discrete": _first_step,
    "diffusers.pipelines.flux.pipeline_flux": _positions,
    "diffusers.pipelines.flux.pipeline_flux_img2img": _positions,
    "diffusers.pipelines.flux2.pipeline_flux2": _latent_positions,
}


class Finder(importlib.abc.MetaPathFinder):
    """Finds what others find, and has `AFTER` called once it is loaded."""

    def __init__(self) -> None:
        self._asking = False

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in AFTER or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_call(module: Any) -> None:
                load(module)
                AFTER[name](module)

            spec.loader.exec_module = load_and_call  # type: ignore[method-assign]
        return spec


if "libnullrt" in os.environ.get("LD_PRELOAD", ""):
    sys.meta_path.insert(0, Finder())
