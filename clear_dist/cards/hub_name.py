"""Names of files on the hub: `owner/name:file`, or `owner/name@revision:file`."""

import re
from dataclasses import dataclass
from typing import Self

_WORD = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?(?::([^:/][^:]*))?", re.ASCII)


@dataclass(frozen=True)
class HubFile:
    """A file on the hub; `revision` is a commit, tag or branch, None: the main branch."""

    repository: str
    revision: str | None
    file: str

    @classmethod
    def of(cls, word: str, *, default: str = "") -> Self | None:
        """The file that `word` names, `default` where it names a repository only; None where it names none."""
        match = _WORD.fullmatch(word)
        file = (match[3] or default) if match else ""
        return cls(match[1], match[2], file) if match and file else None

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{self.repository}{revision}:{self.file}"
