"""hypothesis for the tests that draw their cases; where it is not installed, they are skipped."""

from __future__ import annotations

from typing import Any

import pytest

try:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st
except ImportError:

    class Anything:
        """Stands for a strategy or a setting that nobody will use."""

        def __getattr__(self, name: str) -> Anything:
            return self

        def __call__(self, *_: Any, **__: Any) -> Anything:
            return self

        def __or__(self, other: Any) -> Anything:
            return self

        __ror__ = __or__

    HealthCheck = st = Anything()

    def given(*_: Any, **__: Any) -> pytest.MarkDecorator:
        return pytest.mark.skip(reason="hypothesis is not installed")

    def settings(*_: Any, **__: Any) -> Any:
        return lambda test: test


__all__ = ["HealthCheck", "given", "settings", "st"]
