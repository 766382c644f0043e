"""A ring and a grid of Gaussians: the same, with the exact score beside the learned one.

    python experiments/mixture.py [--quick] [--output FOLDER]        # an hour or more on 2 cores

The same as ``robustdiff reproduce mixture``, which takes these flags; stopped, it goes on where it was.
"""

import sys

from robustdiff.cli import main

if __name__ == "__main__":  # the workers import this file
    sys.exit(main(["reproduce", "mixture", *sys.argv[1:]]))
