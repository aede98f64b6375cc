"""A bound on the kernels that oneDNN keeps for CPU convolutions.

oneDNN compiles a kernel for every new shape and keeps the last 1024 of them. Subnets bring new shapes in
every round, so a CPU run would grow by some megabytes per round until the cache is full of kernels that will
never be used again.
"""

from __future__ import annotations

import os

from torch import nn
from torch.nn.modules.conv import _ConvNd

VARIABLE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"

_KERNELS_PER_LAYER = 8
"""Two subnets, each with a forward pass for training, one for evaluation, and two products of the backward
pass.
"""


def bound_primitive_cache(model: nn.Module) -> None:
    """Let oneDNN keep the kernels of one round of ``model`` and no more.

    Works if no convolution has run in this process before (oneDNN reads the variable once); a value that the
    user has set stays.
    """
    layers = sum(isinstance(m, (_ConvNd, nn.Linear)) for m in model.modules())
    os.environ.setdefault(VARIABLE, str(max(64, _KERNELS_PER_LAYER * layers)))
