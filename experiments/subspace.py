"""Images on a known linear subspace of pixel space (digits; other images by --data): the same.

    python experiments/subspace.py [--quick] [--output FOLDER]        # about 90 minutes on 2 cores

The same as ``robustdiff reproduce subspace``, which takes these flags; stopped, it goes on where it was.
"""

import sys

from robustdiff.cli import main

if __name__ == "__main__":  # the workers import this file
    sys.exit(main(["reproduce", "subspace", *sys.argv[1:]]))
