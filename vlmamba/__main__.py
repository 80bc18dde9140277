"""``python -m vlmamba`` and ``torchrun -m vlmamba``."""

import sys

from vlmamba.cli import main

if __name__ == "__main__":
    sys.exit(main())
