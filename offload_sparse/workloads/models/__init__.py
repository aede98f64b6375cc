"""Networks by name: those of the papers that no library ships, torchvision's and timm's.

Importing this room loads neither torchvision nor timm; both wait until a model of theirs is asked for.
"""

from offload_sparse.workloads.models.registry import build_model, input_channels, takes_tokens

__all__ = ["build_model", "input_channels", "takes_tokens"]
