"""Train: ``accelerate launch launch/train.py --config configs/quickstart.yaml [--policy.rho 0.1 …]``.

The same options and the same run as ``offload-sparse train``; see ``python launch/train.py --help``.
"""

from __future__ import annotations

import sys

from offload_sparse.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
