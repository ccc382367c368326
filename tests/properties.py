"""hypothesis, for the files that hold other tests too: without it only the property tests skip."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ImportError:

    def given(*args, **kwargs):
        return pytest.mark.skip(reason="hypothesis is not installed")

    def settings(*args, **kwargs):
        return lambda test: test

    def _strategy(*args, **kwargs):
        return None

    st = SimpleNamespace(integers=_strategy, sampled_from=_strategy, data=_strategy)

__all__ = ["given", "settings", "st"]
