"""LoRA of a server's folder, by their names: those of a request are held until another one asks for others."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clear_dist.comm.group import Group
from clear_dist.drawing.many import ItemFailed
from clear_dist.families.cards import CARDS
from clear_dist.launch.ends import describe
from clear_dist.options import Refusal, nearest_word
from clear_dist.request.request import Lora
from clear_dist.weights.lora import load_loras, unload_loras

NAME = re.compile(r"\w[\w.-]{0,198}", re.ASCII)
ENDING = ".safetensors"

Loras = tuple[tuple[str, float], ...]


def names_in(folder: Path | None) -> list[str]:
    """What requests may name: files of the folder, without their ending."""
    if folder is None:
        return []
    return sorted(file.stem for file in folder.glob(f"*{ENDING}") if NAME.fullmatch(file.stem) and file.is_file())


def file_of(folder: Path | None, name: str) -> Path:
    """The file that a request names; raises a Refusal for what is none of the folder's."""
    known = names_in(folder)
    if folder is None or name not in known:
        nearest = nearest_word(name, known) if known else "none"
        raise Refusal(f"lora must be one of this server's, which has {len(known)}; nearest: {nearest}")
    return folder / f"{name}{ENDING}"


@dataclass(kw_only=True)
class Shelf:
    """The LoRA that are on the model now; all ranks hold the same."""

    pipe: Any
    group: Group
    folder: Path | None
    _held: Loras = field(default=(), init=False)

    def hold(self, loras: Loras) -> None:
        """Have these on the model and no others; raises ItemFailed on all ranks where one has none, or a bad one."""
        if loras == self._held:
            return
        unload_loras(self.pipe)
        self._held = ()
        why = None
        try:
            folder = self.folder or Path()
            load_loras(self.pipe, [Lora(source=str(folder / name), weight=weight) for name, weight in loras], CARDS)
        except (OSError, ValueError) as error:
            why = str(error) if isinstance(error, Refusal) else describe(error)
        failed = next((each for each in self.group.gather_objects(why) if each is not None), None)
        if failed is not None:
            unload_loras(self.pipe)
            raise ItemFailed(failed)
        self._held = loras
