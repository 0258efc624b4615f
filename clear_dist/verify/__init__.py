"""Checks, run by all ranks together, that this machine computes and communicates as it should; and their table."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch

from clear_dist.comm.group import Group, PeerLost
from clear_dist.comm.process_groups import device_of
from clear_dist.families.transformers import SAMPLES
from clear_dist.launch import env
from clear_dist.launch.ends import Failure, describe, say
from clear_dist.observe import report
from clear_dist.options import JOIN_SECONDS
from clear_dist.request.flags import STDOUT
from clear_dist.request.notes import sharing
from clear_dist.verify import attention, environment, halos, links, text
from clear_dist.verify.finding import Check, Finding, Result, Show, Subjects, gather, shown
from clear_dist.verify.model import verify_model

__all__ = ["CHECKS", "Finding", "Result", "Subjects", "run_checks", "verify"]

CHECKS: Mapping[str, Check] = {
    "environment": environment.compare_environments,
    "halos": halos.check_halos,
    "text reduction": text.check_reductions,
    "attention": attention.check_backends,
    **{f"tiny {sample.name}": partial(verify_model, sample) for sample in SAMPLES},
    "links": links.measure_links,
}
SECONDS_TO_ANSWER = {"cpu": 15.0, "cuda": 60.0}
"""Time limit for a silent rank; on CUDA kernels are compiled, not equally fast on all ranks."""
SCHEMA = 1
MOST_NAMED = 3


def verify(
    device_type: str,
    output: str | None,
    subjects: Subjects | None = None,
    *,
    join_seconds: float = JOIN_SECONDS,
    share_gpus: bool = False,
) -> None:
    """Run and show all checks, with a JSON report in `output` (`-`: stdout, None: none); Failure on all ranks."""
    began, place = time.perf_counter(), env.read()
    if place.threads is not None:
        torch.set_num_threads(place.threads)
    device = device_of(device_type, place.local_rank)
    meeting = Group.create(device, join_seconds=join_seconds, share_gpus=share_gpus)
    for line in sharing(meeting.transport) if place.rank == 0 else ():
        say(line)
    # Ranks may be slow to start; once they are here, one that is silent hangs.
    group = replace(meeting, timeout=timedelta(seconds=SECONDS_TO_ANSWER[device_type])).split(meeting.size)
    with shown(rank=group.rank, to_stderr=output == STDOUT) as show, torch.inference_mode():
        results = run_checks(group, subjects or Subjects(), show)
    seconds = time.perf_counter() - began
    failed = [result for result in results if not result.passed]
    if group.rank == 0:
        _write(_as_dict(group, results, seconds), output)
        if not failed:
            stream = sys.stderr if output == STDOUT else sys.stdout
            print(f"all {len(results)} checks passed in {seconds:.0f} s", file=stream, flush=True)
    group.barrier()  # the first rank that fails ends the others: not before all is written
    if failed:
        named = [f"{result.name} ({result.faults[0]})" for result in failed[:MOST_NAMED]]
        more = [f"{len(failed) - MOST_NAMED} more"] if len(failed) > MOST_NAMED else []
        raise Failure(f"{len(failed)} of {len(results)} checks failed: {'; '.join(named + more)}")
    group.close()
    meeting.close()


def run_checks(group: Group, subjects: Subjects, show: Show, checks: Mapping[str, Check] = CHECKS) -> list[Result]:
    """All ranks' findings, on all ranks; raises PeerLost for a silent rank, RuntimeError naming a broken check."""
    results = []
    for name, check in checks.items():
        try:
            began = time.perf_counter()
            for finding in check(group, subjects):
                results.append(gather(group, finding, time.perf_counter() - began))
                show(results[-1])
                began = time.perf_counter()
        except PeerLost:
            raise
        except Exception as error:
            raise RuntimeError(f"in the check of {name}: {describe(error)}") from error
    return results


def _as_dict(group: Group, results: Sequence[Result], seconds: float) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "passed": all(result.passed for result in results),
        "versions": report.versions(),
        "world_size": group.size,
        "device": group.device.type,
        "transport": group.transport,
        "seconds": seconds,
        "checks": [result.as_dict() for result in results],
    }


def _write(contents: Mapping[str, Any], output: str | None) -> None:
    if output == STDOUT:
        print(json.dumps(contents, indent=1), flush=True)
    elif output is not None:
        report.write(contents, Path(output))
