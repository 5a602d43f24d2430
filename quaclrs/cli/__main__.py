"""``python -m quaclrs.cli``: the same as ``quaclrs-train``; torchrun starts its ranks this way."""

import sys

from quaclrs.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
