"""What is written about a tested fold."""

from quaclrs.system.matplotlib_import import import_matplotlib

import_matplotlib()  # before plots.py and captum do it
