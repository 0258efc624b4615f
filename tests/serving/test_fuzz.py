"""The API as its own document tells it, by schemathesis: nothing that a client sends is answered by a fault."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from tests.serving.live import Live, living, tiny_model

CASES = int(os.environ.get("FUZZ_CASES", "100"))
TINY = ("--max-side", "64", "--max-steps", "1", "--max-images", "1")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("here")
    with living(tiny_model(folder / "model"), folder, *TINY) as server:
        yield server


def test_no_answer_is_a_fault(server: Live) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    drawing = [each for each in operations if "/images/" in each.path]
    assert len(drawing) == 2 and len(operations) > 10
    # Half of the cases draw, or should.
    share = CASES // 2 // len(drawing), max(1, CASES // 2 // (len(operations) - len(drawing)))
    for operation in operations:
        fuzz(operation, share[operation not in drawing])
    assert not server.process.has_ended
    answer = server.client().images.generate(prompt="a", size="64x64", extra_body={"steps": 1})
    assert answer.data


def fuzz(operation: Any, count: int) -> None:
    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(case=operation.as_strategy())
    def is_no_fault(case: Any) -> None:
        answer = case.call(timeout=60)
        assert answer.status_code < 500, (case.as_curl_command(), answer.text)
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    is_no_fault()
