"""The image grid on LSUN: kinds and amounts of dirt by methods, judged against clean held-out images.

    python experiments/lsun.py --data PATH [--scale cpu|gpu-10min|gpu-1h|gpu] [--rows PATTERN] [--extractor FILE.pt]

The same as ``robustdiff reproduce lsun``, which takes these flags; stopped, it goes on where it was.
"""

import sys

from robustdiff.cli import main

if __name__ == "__main__":
    sys.exit(main(["reproduce", "lsun", *sys.argv[1:]]))
