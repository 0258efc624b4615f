"""What is told of a job, to its client and to servers to come."""

from typing import Any

from clear_dist.serving.jobs import Job
from clear_dist.serving.store import Record


def record_of(job: Job) -> Record:
    stages = job.request.stages
    record: dict[str, Any] = {
        "id": job.id,
        "object": "job",
        "status": job.state,
        "created": job.created,
        "asked": job.asked,
        "stage": job.stage,
        "stages": [
            {
                "size": f"{stage.width}x{stage.height}",
                "steps": stage.sampling.steps,
                "refines": stage.starts_from_picture,
            }
            for stage in stages
        ],
        "step": job.step,
        "progress": round(job.work, 4),
        "seconds_left": None if (left := job.seconds_left) is None else round(left, 1),
        "seconds": None if job.seconds is None else round(job.seconds, 3),
        "preview": None if job.preview is None else f"/v1/jobs/{job.id}/preview",
        "images": [f"/v1/results/{job.id}/{file.name}" for file in job.files] if job.error is None else [],
        "error": None if job.error is None else job.error.body()["error"],
    }
    if not job.state.is_final:
        record["images"] = []
    return record
