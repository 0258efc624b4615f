"""A program: FLUX's VAE, its weights never filled, on one null GPU; a picture is encoded and decoded as one stripe.

vae.py FILE SIDE     writes JSON: for `encode` and `decode`, launches by kernel, memory, and that of inputs
"""

import ctypes
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from clear_dist.comm.group import Group
from clear_dist.geometry import Rows
from clear_dist.vae import decode_stripes, encode_stripes
from tests.plan.test_full_size import VAE


def coded(run: Any, vae: AutoencoderKL, shape: tuple[int, ...], log: Path) -> dict[str, Any]:
    stubs, group = ctypes.CDLL("libnullrt.so"), Group.create(torch.device("cuda", 0))
    given = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    stubs.nullcuda_log(str(log).encode())
    run(vae, given, group, (Rows(0, 1),))
    stubs.nullcuda_log(None)
    peak = torch.cuda.max_memory_allocated() - before
    group.close()
    kernels = Counter(re.findall(r"^launch (?:triton )?(\S+)", log.read_text(), re.MULTILINE))
    return {"kernels": kernels, "peak": peak, "given": given.nbytes}


if __name__ == "__main__":
    into, side = Path(sys.argv[1]), int(sys.argv[2])
    with torch.device("meta"):
        model = AutoencoderKL(**VAE)
    model = model.to(torch.bfloat16).to_empty(device="cuda").requires_grad_(False)
    shapes = {"encode": (1, 3, side, side), "decode": (1, 16, side // 8, side // 8)}
    runs = {"encode": encode_stripes, "decode": decode_stripes}
    found = {name: coded(runs[name], model, shape, into.with_suffix(".log")) for name, shape in shapes.items()}
    into.write_text(json.dumps(found))
