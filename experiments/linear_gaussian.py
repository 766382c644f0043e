"""Closed forms of the linear-Gaussian world (docs/theory.md) against what the package trains, samples and attacks.

    python experiments/linear_gaussian.py [--quick] [--output FOLDER]        # half a minute on one core

The same as ``robustdiff reproduce linear-gaussian``, which takes these flags; stopped, it goes on where it was.
"""

import sys

from robustdiff.cli import main

if __name__ == "__main__":  # the workers import this file
    sys.exit(main(["reproduce", "linear-gaussian", *sys.argv[1:]]))
