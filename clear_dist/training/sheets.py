"""Sheets of samples, the teacher's pictures above the student's, from equal embeddings and seeds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from clear_dist.comm.group import Group
from clear_dist.engine.family import PipelineAdapter
from clear_dist.pictures import replacing
from clear_dist.stages import Stage
from clear_dist.training.student import Student

MOST = 4
"""Pictures of a sheet's row."""


class Sheets:
    """Draws with the pipeline whose transformer trains; its VAE is in host memory meanwhile."""

    def __init__(
        self,
        pipe: Any,
        adapter: PipelineAdapter,
        student: Student,
        prompts: Sequence[Tensor],
        nothing: Sequence[Tensor],
        stage: Stage,
    ) -> None:
        """Embeddings [pictures, ...] of what is shown, and [1, ...] of the empty prompt."""
        self._pipe, self._adapter, self._student, self._stage = pipe, adapter, student, stage
        device, dtype = pipe.transformer.device, pipe.transformer.dtype

        def placed(x: Tensor) -> Tensor:
            return x.to(device, dtype if x.is_floating_point() else x.dtype)

        without = [placed(x) for x in nothing] if stage.sampling.passes > 1 else []
        each = ([placed(x[index : index + 1]) for x in prompts] for index in range(len(prompts[0])))
        self._prompts = [dict(zip(adapter.arguments, [*prompt, *without], strict=False)) for prompt in each]

    @torch.no_grad()
    def draw(self, file: Path, group: Group) -> None:
        """Called on all ranks, which draw the same; rank 0 writes."""
        passes = self._student.passes
        with passes.teacher():
            rows = [self._latents()]
        passes.outputs.clear()
        rows.append(self._latents())
        if group.rank == 0:
            sheet = torch.cat([torch.cat(self._decoded(row), dim=1) for row in rows])
            file.parent.mkdir(exist_ok=True)
            with replacing(file) as partial:
                Image.fromarray(sheet.numpy()).save(partial)
        group.barrier()

    def _latents(self) -> list[Tensor]:
        drawn = self._adapter.denoise
        return [drawn(self._pipe, prompt, self._stage, seed=seed) for seed, prompt in enumerate(self._prompts)]

    def _decoded(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """uint8 [H, W, 3] each."""
        vae, device = self._pipe.vae, self._pipe.transformer.device
        vae.to(device)
        pictures = []
        for each in latents:
            whole = self._adapter.unpacked(each, slice(None), self._stage.size)
            pixels = vae.decode(self._adapter.for_vae(whole).to(vae.dtype)).sample[0]
            pictures.append(((pixels.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu())
        vae.to("cpu")
        return pictures
