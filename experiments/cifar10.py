"""The image grid on CIFAR-10: kinds and amounts of dirt by methods, judged against clean held-out images.

    python experiments/cifar10.py --data PATH [--scale cpu|gpu-10min|gpu-1h|gpu] [--rows PATTERN] [--extractor FILE.pt]

The same as ``robustdiff reproduce cifar10``, which takes these flags; stopped, it goes on where it was.
"""

import sys

from robustdiff.cli import main

if __name__ == "__main__":
    sys.exit(main(["reproduce", "cifar10", *sys.argv[1:]]))
