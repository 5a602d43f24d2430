"""quaclrs: spectrogram images to trained classifiers, fast and without surprises.

Importing the package loads neither torch nor DALI; each module imports what it needs.
"""

__version__ = "0.1.0"
