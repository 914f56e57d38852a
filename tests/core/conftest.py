"""Settings of property tests: no clock, no database of examples, the same examples every time."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("moescope", deadline=None, derandomize=True, database=None)
settings.load_profile("moescope")
