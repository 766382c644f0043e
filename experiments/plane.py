"""A plane in space, with inlier noise and with outliers: every method, exact errors, the frontier of strengths.

    python experiments/plane.py [--quick] [--output FOLDER]        # about half an hour on 2 cores

The same as ``robustdiff reproduce plane``, which takes these flags; stopped, it goes on where it was.
"""

import sys

from robustdiff.cli import main

if __name__ == "__main__":  # the workers import this file
    sys.exit(main(["reproduce", "plane", *sys.argv[1:]]))
