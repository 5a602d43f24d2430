#!/usr/bin/env python3
"""``quaclrs-inspect`` under its former name, with the same flags; see quaclrs/cli/inspect.py."""

import sys
from functools import partial

from quaclrs.cli.inspect import main as inspect_main

main = partial(inspect_main, program="inspect_shards.py")

if __name__ == "__main__":
    sys.exit(main())
