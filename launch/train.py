"""Train: ``accelerate launch launch/train.py --config configs/quickstart.yaml [--policy.rho 0.1 …]``.

The same options and the same run as ``offload-sparse train``; see ``python launch/train.py --help``.
"""

from __future__ import annotations

import runpy
import sys

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    runpy.run_module("offload_sparse.cli", run_name="__main__")
