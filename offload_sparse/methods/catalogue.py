"""The catalogue of the methods: each by its name."""

from __future__ import annotations

from collections.abc import Callable

from offload_sparse.methods import controls, sparse_offload
from offload_sparse.methods.method import Method, Task
from offload_sparse.methods.weight_masks import dfbst, dst, grow_efficient, rigl

_BUILDERS: dict[str, Callable[[Task], Method]] = {
    "sparse_offload": sparse_offload.build,
    "dense": controls.build_dense,
    "dfbst": dfbst.build,
    "dst": dst.build,
    "grow_efficient": grow_efficient.build,
    "rigl": rigl.build,
    "static": controls.build_static,
}


def build_method(task: Task) -> Method:
    """The method that ``task.config.method`` names."""
    return _BUILDERS[task.config.method](task)
