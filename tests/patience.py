"""Limits against hanging: no test asserts them, and all grow with TEST_PATIENCE, which `.ci/run` sets from the load."""

import os

PATIENCE = int(os.environ.get("TEST_PATIENCE", "1"))
SECONDS_PER_TEST = 600 * PATIENCE
"""Above those of ranks, which tell what each of them did."""
