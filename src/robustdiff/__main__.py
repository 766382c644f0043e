"""``python -m robustdiff``, the same as the ``robustdiff`` command."""

import sys

from robustdiff.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
