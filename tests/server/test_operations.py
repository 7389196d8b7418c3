"""docs/operations.md names every metric, and every field of the log."""

import re
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from server import calibration, metrics
from server.middleware import request_log

DOCS = Path(__file__).parents[2] / "docs" / "operations.md"


def test_every_metric_is_documented():
    """Those of the API server, and of the worker."""
    from proxy.engine.metrics import _counters

    _counters()
    assert metrics and calibration  # imported for what they register
    names = set()
    for family in REGISTRY.collect():
        if family.name.startswith("assent_"):
            names.add(family.name + ("_total" if family.type == "counter" else ""))
    documented = set(re.findall(r"^\| `(assent_\w+)` \|", DOCS.read_text(), re.MULTILINE))
    assert documented == names
    assert len(names) > 15


@pytest.mark.parametrize("module", [metrics, calibration])
def test_the_docstrings_agree(module):
    documented = DOCS.read_text()
    for name in re.findall(r"^(assent_\w+)", module.__doc__, re.MULTILINE):
        assert f"`{name}`" in documented


def test_every_field_of_the_log_is_documented():
    fields = re.findall(r'"(\w+)":', request_log.__doc__)
    documented = DOCS.read_text()
    assert len(fields) > 12
    assert not [name for name in fields if f"`{name}`" not in documented]
