"""Invariance against equivariance at equal strength, and what theory says of both (T3, T5).

    python experiments/invariance.py [--quick] [--output FOLDER]        # about 8 minutes on 2 cores

The same as ``robustdiff reproduce invariance``, which takes these flags; stopped, it goes on where it was.
"""

import sys

from robustdiff.cli import main

if __name__ == "__main__":  # the workers import this file
    sys.exit(main(["reproduce", "invariance", *sys.argv[1:]]))
