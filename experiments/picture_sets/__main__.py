"""``python -m experiments.picture_sets --output FOLDER --size 64``: a sheet of 8 x 8 pictures for each kind."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.picture_sets import KINDS, pictures

SIDE = 8


def sheet(kind: str, size: int, channels: int = 3, seed: int = 0) -> Image.Image:
    """Pictures of a kind side by side."""
    made = np.pad(pictures(kind, SIDE**2, size, channels, seed), ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=128)
    rows = made.reshape(SIDE, SIDE, channels, size + 2, size + 2).transpose(0, 3, 1, 4, 2)
    return Image.fromarray(rows.reshape(SIDE * (size + 2), SIDE * (size + 2), channels).squeeze())


def main() -> None:
    """Write the sheets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for one PNG a kind")
    parser.add_argument("--size", type=int, default=64, help="height and width of a picture")
    parser.add_argument("--channels", type=int, default=3, choices=(1, 3), help="colour or grey")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, metavar="KIND", help="some of them")
    parser.add_argument("--seed", type=int, default=0, help="other pictures")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for kind in arguments.kinds:
        sheet(kind, arguments.size, arguments.channels, arguments.seed).save(arguments.output / f"{kind}.png")


if __name__ == "__main__":
    main()
