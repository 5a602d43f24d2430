#!/usr/bin/env python3
"""``quaclrs-pack`` under its former name, with the same flags; see quaclrs/cli/pack.py."""

import sys
from functools import partial

from quaclrs.cli.pack import main as pack_main

main = partial(pack_main, program="shard_dataset.py")

if __name__ == "__main__":
    sys.exit(main())
