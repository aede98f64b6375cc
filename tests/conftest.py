"""Tests run in two processes at once; each, and each rank that it starts, computes on one core."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # the first call of an operation may be slow
settings.load_profile("untimed")
