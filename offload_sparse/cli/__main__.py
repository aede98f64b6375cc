"""``python -m offload_sparse.cli``."""

import sys

from offload_sparse.cli.main import main

sys.exit(main())
