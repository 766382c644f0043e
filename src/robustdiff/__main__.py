"""``python -m robustdiff``, the same as the ``robustdiff`` command."""

import sys

from robustdiff.cli import main

if __name__ == "__main__":
    sys.exit(main())
