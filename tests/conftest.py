"""Tests run in two processes at once; each, and each rank that it starts, computes on one core."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
