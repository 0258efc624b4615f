"""One archive of a folder of results, with nothing in it that is private; plans beside what was measured.

    python -m benchmarks.gpu.archive FOLDER

Left out of texts: folders, names of the machine and the user, its addresses, tokens. In the archive nobody owns files.
"""

import getpass
import gzip
import json
import os
import re
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from huggingface_hub.constants import HF_HUB_CACHE

from benchmarks.gpu.session import shown
from benchmarks.lib.flags import Parser
from benchmarks.lib.machine import save

ROOT = Path(__file__).parents[2]
TEXTS, PICTURES = (".json", ".csv", ".log", ".txt", ".tsv"), (".png", ".safetensors")
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|KEY", re.IGNORECASE)
SHORTEST_SECRET = 6
TOKEN = re.compile(r"\bhf_\w{8,}|(?<=://)[^\s/@]+(?=@)")
"""Tokens of the hub, and what an address of the web has before its host."""
ESCAPED = re.compile(r"(?<!\\)(?:\\u(?!00[0-7])[0-9a-fA-F]{4})+")
"""Letters beyond ASCII, as JSON has them."""
FOLDER = re.compile(r"https?://\S+|(?<![\w.<>-])(?:~|<path>|/[\w.@+~-]+)(?:/[\w.@+~-]*)+")
"""Paths of two names or more from the root, or from someone's home; and web addresses, to be left alone."""
GIGA = 1e9


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("private", nargs="*", help="what else to leave out of texts, such as a model's folder")
    options = parser.parse_args()
    folder = options.folder.resolve()
    planned = list(beside_plans(folder))
    save({"pictures": planned}, folder / "plans.json")
    for row in planned:
        print(*(f"{name}={shown(value)}" for name, value in row.items()))
    print(f"archive={pack(folder, Private([str(options.folder), str(folder), *options.private]))}")


def pack(folder: Path, private: "Private") -> Path:
    """The archive, beside `folder` and named like it."""
    archive = folder.with_name(f"{folder.name}.tar.gz")
    with tempfile.TemporaryDirectory() as scratch, tarfile.open(archive, "w:gz") as tar:
        for file in sorted(folder.rglob("*")):
            name = str(Path(folder.name) / file.relative_to(folder))
            if file.suffix in PICTURES:
                tar.add(file, name, filter=unowned)
            elif file.suffix in TEXTS or file.suffixes[-2:] == [".json", ".gz"]:
                clean = Path(scratch) / "file"
                is_packed = file.suffix == ".gz"
                read = gzip.decompress(file.read_bytes()) if is_packed else file.read_bytes()
                text = private.removed(read.decode(errors="replace")).encode(errors="replace")
                clean.write_bytes(gzip.compress(text) if is_packed else text)
                tar.add(clean, name, filter=unowned)
    return archive


def unowned(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


class Private:
    """Words that tell who and where this is; those of `folders` that are of this machine may have spaces."""

    def __init__(self, folders: Sequence[str] = ()) -> None:
        secrets = [value for name, value in os.environ.items() if SECRET.search(name) and len(value) >= SHORTEST_SECRET]
        user = getpass.getuser()
        self._words = {secret: "<secret>" for secret in (*secrets, get_token()) if secret}
        self._words |= dict.fromkeys(hosts(), "<host>") | dict.fromkeys(addresses(), "<address>")
        self._words |= {} if user == "root" else {user: "<user>"}
        known = (*folders, str(ROOT), str(Path.home()), sys.prefix, HF_HUB_CACHE)
        self._folders = {folder: "<path>" for folder in known if os.path.isabs(folder) and folder != os.sep}

    def removed(self, text: str) -> str:
        text = ESCAPED.sub(lambda found: json.loads(f'"{found[0]}"'), text)
        text = replaced(TOKEN.sub("<secret>", text.replace(f"{ROOT}/", "")), self._folders)
        return replaced(FOLDER.sub(lambda found: kept(found[0]), text), self._words)


def replaced(text: str, words: Mapping[str, str]) -> str:
    """The longest first, as one may be a part of another."""
    for word in sorted(words, key=len, reverse=True):
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", words[word], text)
    return text


def kept(path: str) -> str:
    """What remains of a path: what is a package's own, or on the web."""
    if path.startswith("http"):
        return path
    _, found, inside = path.partition("/site-packages/")
    return inside if found else "<path>"


def hosts() -> set[str]:
    names = {socket.gethostname(), socket.getfqdn()}
    return {part for name in names for part in (name, name.split(".")[0])} - {"localhost", ""}


def addresses() -> list[str]:
    try:
        return subprocess.run(["hostname", "-I"], capture_output=True, text=True, timeout=5).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return []


def beside_plans(folder: Path) -> Iterator[dict[str, Any]]:
    """Memory of each picture that was drawn: what was planned, CUDA's own included, and what it took, without.

    The plan's file is empty for a model that `plan` does not know.
    """
    for file in sorted(folder.glob("*.report.json")):
        name = file.name.removesuffix(".report.json")
        plan, report = json.loads((folder / f"{name}.plan.json").read_text() or "null"), json.loads(file.read_text())
        yield {
            "picture": name,
            "ranks": report["world_size"],
            "seconds": sum(report["seconds"][phase] for phase in ("encode", "denoise", "decode")),
            "planned_seconds": plan and plan["seconds"] and plan["seconds"]["all"],
            "peak_gigabytes": max(*report["peak_memory_bytes"], *report["loading"]["peak_memory_bytes"]) / GIGA,
            "planned_gigabytes": plan and plan["needed"] / GIGA,
        }


if __name__ == "__main__":
    main()
