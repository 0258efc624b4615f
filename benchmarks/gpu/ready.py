"""What first_hour.sh needs first: GPUs that torch sees, packages, the model's licence, room on the disk.

    python -m benchmarks.gpu.ready --model black-forest-labs/FLUX.1-dev --clear-weights auto --folder FOLDER
    python -m benchmarks.gpu.ready --fetch ...     files that are missing, too, and their headers compared

Ends with a line of what was found, or with one that says what is missing.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.lib.flags import Parser
from benchmarks.lib.machine import machine, save
from clear_dist import hub
from clear_dist.comm.group import Group
from clear_dist.families.cards import CARDS
from clear_dist.launch import ends, env
from clear_dist.launch.ends import Failure
from clear_dist.options import Refusal
from clear_dist.request import devices
from clear_dist.request.flags import GenerateFlags
from clear_dist.request.request import Request
from clear_dist.request.settle import choose

GIGA = 1e9


def main(arguments: Sequence[str] | None = None) -> None:
    parser = weights_parser(__doc__)
    parser.add_argument("--fetch", action="store_true", help="download what is missing")
    in_one_line(partial(tell, parser.parse_args(arguments)))


def in_one_line(work: Callable[[], None]) -> None:
    """Do the work, and end with one line where the command would."""
    try:
        work()
    except Refusal as refusal:
        raise SystemExit(ends.refuse(str(refusal))) from None
    except Failure as failure:
        raise SystemExit(ends.fail(failure, traceback=False)) from None


def weights_parser(description: str | None) -> Parser:
    parser = Parser(description)
    parser.add_argument("--model", required=True, help="a folder in diffusers' layout, or a hub id")
    parser.add_argument("--clear-weights", required=True, help="as of clear-dist generate")
    parser.add_argument("--folder", type=Path, required=True, help="for the results")
    return parser


def tell(options: argparse.Namespace) -> None:
    request = chosen(options)
    if find_spec("matplotlib") is None:
        raise Refusal("the tables are plotted by matplotlib, which is missing; nearest: pip install -e '.[bench]'")
    if options.fetch:
        group = Group.create(torch.device("cpu"))
        located = hub.locate(request, group, CARDS, local_rank=0)
        print(f"model={request.model_name} clear_weights={Path(located.clear_weights or 'none').name}")
        group.close()
        return
    hub.ask(request, CARDS)
    save(machine(torch.device("cuda")), options.folder / "machine.json")
    memory = min(torch.cuda.get_device_properties(gpu).total_memory for gpu in range(torch.cuda.device_count()))
    print(f"gpus={torch.cuda.device_count()} gigabytes={memory / GIGA:.0f} name={torch.cuda.get_device_name()}")


def chosen(options: argparse.Namespace) -> Request:
    """The request of a picture; raises a Refusal where GPUs, model or weights are wrong, before any download."""
    gpus = devices.gpus_for("cuda")
    flags = GenerateFlags(
        prompt="",
        model=options.model,
        clear_weights=options.clear_weights,
        nproc=1,
        output=options.folder / "picture.png",
    )
    return choose(flags, env.read(), CARDS, device="cuda", gpus=gpus)[0]


if __name__ == "__main__":
    main()
