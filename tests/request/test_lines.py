"""Lists of prompts: what lines say, and what is wrong with them."""

import json
from pathlib import Path
from typing import Any

import pytest

from clear_dist.launch.env import Place
from clear_dist.options import Refusal
from clear_dist.request.lines import Line, read_list


def read(folder: Path, *lines: Any, name: str = "list.jsonl") -> tuple[Line, ...]:
    file = folder / name
    file.write_text("\n\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return read_list(file, Place())


def test_lines_have_what_is_their_own(tmp_path: Path) -> None:
    whole = {"prompt": "a fox", "negative_prompt": "fog", "seed": 3, "size": "96x64", "output": "fox.png"}
    assert read(tmp_path, whole, {"prompt": "two dogs", "size": 128}, {"prompt": ""}) == (
        Line(prompt="a fox", negative_prompt="fog", seed=3, height=64, width=96, output=Path("fox.png")),
        Line(prompt="two dogs", height=128, width=128),
        Line(prompt=""),
    )


def test_other_files_have_prompts_alone(tmp_path: Path) -> None:
    text = '{"prompt": "a fox"}'
    assert read(tmp_path, text, "two dogs", name="list.txt") == (Line(prompt=text), Line(prompt="two dogs"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": ', r"line 2 of list.jsonl must be a JSON object, got '{\"prompt\":' \(Expecting value"),
        (["a fox"], "line 2 of list.jsonl must be a JSON object with a prompt, got"),
        ({"seed": 1}, "line 2 of list.jsonl must be a JSON object with a prompt, got"),
        (
            {"prompt": "x", "sede": 1},
            "line 2 of list.jsonl may have prompt, negative_prompt, seed, size, output, got 'sede'; nearest: seed$",
        ),
        ({"prompt": 3}, "prompt in line 2 of list.jsonl must be a text, got 3$"),
        ({"prompt": "x", "seed": "1"}, 'seed in line 2 of list.jsonl must be a whole number, got "1"$'),
        ({"prompt": "x", "seed": True}, "seed in line 2 of list.jsonl must be a whole number, got true$"),
        ({"prompt": "x", "seed": -1}, "seed in line 2 of list.jsonl must be from 0 to .*, got -1; nearest: 0$"),
        ({"prompt": "x", "size": "wide"}, "size in line 2 of list.jsonl must be a side or WIDTHxHEIGHT, got 'wide'"),
        ({"prompt": "x", "size": "8x64"}, "size in line 2 of list.jsonl must be from 16 to 32768, got 8; nearest: 16$"),
        ({"prompt": "x", "output": "x.pgn"}, "output in line 2 of list.jsonl must end in .*'x.pgn'; nearest: x.png$"),
    ],
)
def test_what_is_wrong_with_a_line_is_told(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(Refusal, match=f"^{message}"):
        read(tmp_path, {"prompt": "a fox"}, line)
