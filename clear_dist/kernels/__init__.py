"""Triton kernels of ours for what is neither a product of matrices nor attention, each beside its torch form.

The torch form is the reference, and serves where Triton does not.
"""

import os
import shutil
import sys
from functools import lru_cache
from importlib.util import find_spec

import torch

AMPERE = 8
"""Compute capability from which Triton knows a GPU."""


@lru_cache
def usable(device_type: str) -> bool:
    """Whether they run on this machine: a GPU from Ampere on, or a CPU under TRITON_INTERPRET=1, for tests.

    Not without a C compiler, with which Triton builds what launches them.
    """
    if device_type not in ("cpu", "cuda") or find_spec("triton") is None:
        return False
    if device_type == "cpu":
        import triton

        return bool(triton.knobs.runtime.interpret)
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        return False
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= AMPERE


def shared_memory(device: torch.device | str) -> int:
    """Bytes that one program may take on a GPU, this process's by default; any number where there is none."""
    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        return sys.maxsize
    found = torch.cuda.get_device_properties(device)
    return getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block)  # AMD has one size only


def power_of_two(number: int) -> int:
    """The least that is not below `number`; Triton's blocks have no other sizes."""
    return 1 << (number - 1).bit_length()
