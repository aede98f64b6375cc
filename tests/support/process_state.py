"""What a process keeps for its life: every test begins and ends as if it had one of its own."""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_OF_PYTEST = "PYTEST_CURRENT_TEST"
_MANY_MODULES = 200

_modules_left_out = 0


def leave_imports_to_the_end() -> None:
    """Every run collects garbage: what many modules have brought is not looked through each time."""
    global _modules_left_out
    if len(sys.modules) >= _modules_left_out + _MANY_MODULES:
        gc.collect()
        gc.freeze()
        _modules_left_out = len(sys.modules)


def begin() -> None:
    """Random numbers of a test, and of the fixtures that it is the first to ask for, are its own."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@contextmanager
def put_back() -> Iterator[None]:
    """The environment, accelerate's state of the process, and torch's, are afterwards what they were."""
    environment = dict(os.environ)
    torch = sys.modules.get("torch")
    settings = (
        (
            (torch.set_num_threads, torch.get_num_threads()),
            (torch.set_default_dtype, torch.get_default_dtype()),
            (torch.set_grad_enabled, torch.is_grad_enabled()),
            (torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()),
        )
        if torch
        else ()
    )
    yield
    for name in os.environ.keys() - environment.keys() - {_OF_PYTEST}:
        del os.environ[name]
    for name, value in environment.items():
        if name != _OF_PYTEST and os.environ.get(name) != value:
            os.environ[name] = value
    for setter, value in settings:
        setter(value)
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)
