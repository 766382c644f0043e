"""Time and memory of precision, recall, density and coverage, and of diversity, on random features.

    OMP_NUM_THREADS=1 python -m benchmarks.neighbours -n 50000 --features 512

Prints JSON: seconds of each part, and the most memory the process ever held (``ru_maxrss``), before and after.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time

import torch
from tqdm import tqdm

from robustdiff.evaluation.neighbours import (
    diversity,
    precision_recall_density_coverage,
)


def peak() -> float:
    """Most memory held so far, GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 2)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=50_000, help="rows on either side")
    parser.add_argument("--features", type=int, default=512, help="numbers per row")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(arguments.n, arguments.features, generator=generator) for _ in range(2))
    found: dict[str, object] = {**vars(arguments), "torch": torch.__version__, "gib_before": peak()}
    with tqdm(total=3 * arguments.n, unit="row", disable=not sys.stderr.isatty()) as bar:
        started = time.perf_counter()
        found |= precision_recall_density_coverage(real, fake, progress=bar.update)
        found["seconds"], found["gib"] = round(time.perf_counter() - started, 1), peak()
    started = time.perf_counter()
    found["diversity"] = diversity(fake, real)
    found["seconds_diversity"], found["gib_diversity"] = round(time.perf_counter() - started, 1), peak()
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
