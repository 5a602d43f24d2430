#!/usr/bin/env python3
"""``quaclrs-synthesize`` under its former name, with the same flags; see quaclrs/cli/synthesize.py."""

import sys
from functools import partial

from quaclrs.cli.synthesize import main as synthesize_main

main = partial(synthesize_main, program="synthesize_dataset.py")

if __name__ == "__main__":
    sys.exit(main())
