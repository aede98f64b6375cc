"""Configurations in which class constants have other values, for tests that need them."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

Kind = TypeVar("Kind")


def configured(kind: type[Kind], **settings: Any) -> Kind:
    """An instance of a configuration class; a setting that is no field replaces the constant of its name."""
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    constants = {name: value for name, value in settings.items() if name not in names}
    assert all(hasattr(kind, name) for name in constants), constants
    changed: type[Kind] = type(kind.__name__, (kind,), constants) if constants else kind
    return changed(**{name: value for name, value in settings.items() if name in names})
