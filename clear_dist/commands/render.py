"""What each rank does for `generate`: load, encode, denoise, decode, save, report."""

import json
import secrets
import shlex
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from safetensors.torch import save
from torch import Tensor

from clear_dist import __version__, demo, loading, report
from clear_dist.comm import env
from clear_dist.comm.ends import say
from clear_dist.comm.group import Group
from clear_dist.comm.interrupts import unwinding
from clear_dist.config import Refusal, Request
from clear_dist.generation import decode, denoise
from clear_dist.parallelize import Parallelized, parallelize
from clear_dist.pictures import numbered, replacing, save_picture
from clear_dist.progress import Phases, watched
from clear_dist.text import encode_prompts

SEED_BITS = 32


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """One request on one rank, its model loaded."""

    request: Request
    seed: int
    device: torch.device
    group: Group
    pipe: Any
    handle: Parallelized
    phases: Phases
    began: float
    peak_since_loading: bool

    def run(self) -> None:
        """All pictures of the request, and its report."""
        latents = [self._render_prompt(index) for index in range(len(self.request.prompts))]
        if self.request.latents_out is not None and self.group.rank == 0:
            with self.phases.phase("save"), replacing(self.request.latents_out) as partial:
                partial.write_bytes(save({"latents": torch.cat(latents)}))
        if self.request.report is not None:
            self._report(self.request.report)

    def _render_prompt(self, index: int) -> Tensor:
        """Latents [num_images, tokens, 64] on the CPU; their pictures are saved."""
        request, began = self.request, time.perf_counter()
        height, width = self._size()
        detail = f" {index + 1} of {len(request.prompts)}" if len(request.prompts) > 1 else ""
        with self.phases.phase("text", detail=detail):
            embeddings = self._encode(request.prompts[index])
        with self.phases.phase("denoise", detail=detail, steps=request.steps):
            latents = denoise(
                self.pipe,
                embeddings,
                height=height,
                width=width,
                num_inference_steps=request.steps,
                guidance_scale=request.guidance_scale,
                true_cfg_scale=request.true_cfg_scale,
                seed=self.seed,
                on_step=self._end_step,
            )
        with self.phases.phase("decode", detail=detail):
            images = decode(self.pipe, latents, height=height, width=width)
        with self.phases.phase("save", detail=detail):
            files = self._save(images, index)
        for file in files:
            self._tell(file, height, width, time.perf_counter() - began)
        return latents.cpu()

    def _encode(self, prompt: str) -> dict[str, Tensor]:
        request = self.request
        if self.group.rank == 0:
            for line in loading.cut_off(self.pipe, prompt, request.max_sequence_length):
                say(f"warning: {line}")
        negative = request.negative_prompt if request.true_cfg_scale > 1 else None
        return encode_prompts(
            self.pipe,
            self.group,
            self.handle.counters,
            [prompt],
            negative_prompts=None if negative is None else [negative],
            max_sequence_length=request.max_sequence_length,
            num_images=request.num_images,
        )

    def _end_step(self, done: int) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # else the launch of the step's kernels is timed, not the step
        self.phases.end_step(done)

    def _save(self, images: list[Image], prompt_index: int) -> list[Path]:
        request, count = self.request, len(self.request.prompts) * self.request.num_images
        files = []
        for index, image in enumerate(images):
            file = numbered(request.output, prompt_index * request.num_images + index, count)
            save_picture(image, file, self._metadata(request.prompts[prompt_index], index))
            files.append(file)
        return files

    def _metadata(self, prompt: str, index: int) -> dict[str, str]:
        """What made one picture, and may be shared with it: no other prompts, no folders of this machine."""
        settings = self._settings()
        for name in ("prompts", "negative_prompt", "output", "latents_out", "report"):
            del settings[name]
        for name in ("model", "clear_weights"):
            if settings[name] is not None and Path(settings[name]).exists():
                settings[name] = "demo" if settings[name] == str(demo.WEIGHTS) else Path(settings[name]).name
        own = {"prompt": prompt, "seed": str(self.seed), "Software": f"clear-dist {__version__}", "image": str(index)}
        if self.request.negative_prompt is not None:
            own["negative_prompt"] = self.request.negative_prompt
        return own | {"settings": json.dumps(settings)}

    def _settings(self) -> dict[str, Any]:
        """The request as plain values, with what this run has chosen: settings that make the picture again."""
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self.request).items()}
        chosen = {"seed": self.seed, "text_attention": self.handle.text_attention, "transport": self.group.transport}
        return plain | {"prompts": list(self.request.prompts)} | chosen

    def _size(self) -> tuple[int, int]:
        assert self.request.height is not None and self.request.width is not None, "known once the model is located"
        return self.request.height, self.request.width

    def _tell(self, file: Path, height: int, width: int, seconds: float) -> None:
        fields = {
            "output": shlex.quote(str(file)),
            "seed": self.seed,
            "size": f"{width}x{height}",
            "ranks": self.group.size,
            "seconds": f"{seconds:.2f}",
        }
        print(" ".join(f"{name}={value}" for name, value in fields.items()), flush=True)

    def _report(self, file: Path) -> None:
        figures = report.RankFigures(
            peak_memory_bytes=report.peak_memory(self.device),
            peak_since_loading=self.peak_since_loading,
            comm=self.handle.counters.as_dict(),
        )
        ranks = self.group.gather_objects(figures)
        if self.group.rank != 0:
            return
        contents = report.build(
            seed=self.seed,
            settings=self._settings(),
            grid=self.handle.grid,
            stripes=self.handle.stripes,
            seconds=self.phases.seconds | {"total": time.time() - self.began},
            seconds_per_step=self.phases.seconds_per_step,
            ranks=ranks,
        )
        report.write(contents, file)


def render(request: Request, began: float) -> None:
    """Make the pictures of `request` together with the other ranks, if there are any.

    Args:
        began: wall clock at which the command was given, for the time that starting took.

    Raises:
        Refusal: only the loaded model could tell that the request is wrong.
    """
    with watched(rank=env.read().rank) as phases, torch.inference_mode():
        rendering = _prepare(request, began, phases)
        with unwinding():  # from here on files are written
            rendering.run()
    rendering.group.close()


def _prepare(request: Request, began: float, phases: Phases) -> Rendering:
    place = env.read()
    if place.threads is not None:
        torch.set_num_threads(place.threads)  # torch may have been imported before the share was known
    device = _device(request.device, place.local_rank)
    group = Group.create(device)
    phases.seconds["launch"] = time.time() - began
    with phases.phase("load"):
        request = loading.locate(request, group, local_rank=place.local_rank)
        pipe = loading.load_pipeline(
            Path(request.model),
            with_text_encoders=group.rank == 0,
            dtype=getattr(torch, request.dtype),
            device=device,
        )
        handle = _parallelize(pipe, request, group)
    seed = group.broadcast_object(secrets.randbits(SEED_BITS) if request.seed is None else request.seed)
    torch.manual_seed(seed)
    return Rendering(
        request=request,
        seed=seed,
        device=device,
        group=group,
        pipe=pipe,
        handle=handle,
        phases=phases,
        began=began,
        peak_since_loading=report.reset_peak_memory(device),
    )


def _parallelize(pipe: Any, request: Request, group: Group) -> Parallelized:
    try:
        return parallelize(
            pipe,
            window=request.window,
            clear_weights=request.clear_weights,
            text_attention=request.text_attention,
            attention_backend=request.attention_backend,
            group=group,
        )
    except ValueError as error:
        raise Refusal(str(error)) from error


def _device(kind: str, local_rank: int) -> torch.device:
    return torch.device(kind, local_rank % torch.cuda.device_count()) if kind == "cuda" else torch.device(kind)
