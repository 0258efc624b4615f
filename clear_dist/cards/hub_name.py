"""A file on the hub as a word: `owner/name:file`, or `owner/name@revision:file` for one that never changes."""

import re
from dataclasses import dataclass
from typing import Self

_WORD = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?(?::([\w./-]+))?", re.ASCII)


@dataclass(frozen=True)
class HubFile:
    """`str` gives the word."""

    repository: str
    revision: str | None
    """A commit, tag or branch; None: the repository's main branch."""
    file: str

    @classmethod
    def of(cls, word: str, *, default: str = "") -> Self | None:
        """None where `word` is none.

        Args:
            default: the file of a word that tells the repository only; without, that is none.
        """
        match = _WORD.fullmatch(word)
        file = (match[3] or default) if match else ""
        return cls(match[1], match[2], file) if match and file else None

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{self.repository}{revision}:{self.file}"
