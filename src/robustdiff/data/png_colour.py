"""Colours that a PNG declares without a profile (chunks cICP, gAMA and cHRM) -> the profile that says the same."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

CHUNKS = (b"cICP", b"sRGB", b"gAMA", b"cHRM")
Chromaticities = tuple[float, ...]
"""x and y of white, red, green and blue."""

SRGB: Chromaticities = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
PRIMARIES: Mapping[int, Chromaticities] = {
    1: SRGB,
    5: (0.3127, 0.3290, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),
    6: (0.3127, 0.3290, 0.63, 0.34, 0.31, 0.595, 0.155, 0.07),
    9: (0.3127, 0.3290, 0.708, 0.292, 0.17, 0.797, 0.131, 0.046),
    11: (0.314, 0.351, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),
    12: (0.3127, 0.3290, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),
}
"""Primaries by their number in ITU-T H.273: BT.709, BT.601 (625 and 525 lines), BT.2020, DCI P3, Display P3."""
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
BT709_CURVE = (1 / 0.45, 1 / 1.099, 0.099 / 1.099, 1 / 4.5, 0.081)
CURVES: Mapping[int, tuple[float, ...]] = {
    **dict.fromkeys((1, 6, 14, 15), BT709_CURVE),
    4: (2.2,),
    5: (2.8,),
    8: (1.0,),
    13: SRGB_CURVE,
}
"""Curves by the number of a transfer in ITU-T H.273: an exponent, or the five numbers of a straight line and a power.
Those of high dynamic range (PQ, HLG) have no meaning in 8 bits without a choice of brightness."""
UNKNOWN = b"colours of another kind"
"""In the place of a profile: what is declared cannot be converted, which is remarked upon."""
USUAL_GAMMA = range(45000, 46001)
"""What files hold in ``gAMA`` (times 100,000) that mean sRGB; its curve is no power, and decoders know."""
D50 = (0.9642, 1.0, 0.8249)
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def profile(chunks: Mapping[bytes, bytes], *, grey: bool) -> bytes | None:
    """An ICC profile, or None if colours are those of sRGB; :data:`UNKNOWN` if they cannot be converted.

    Args:
        chunks: What is in the file of :data:`CHUNKS`. The first that is there rules, as the standard says.
        grey: Whether the picture has no colour.
    """
    if len(coded := chunks.get(b"cICP", b"")) == 4:
        primaries, curve = PRIMARIES.get(coded[0]), CURVES.get(coded[1])
        if primaries is None or curve is None or coded[2] or not coded[3]:
            return UNKNOWN
    elif b"sRGB" in chunks:
        return None
    else:
        primaries, curve = SRGB, SRGB_CURVE
        if len(packed := chunks.get(b"cHRM", b"")) == 32:
            primaries = tuple(one / 100_000 for one in struct.unpack(">8I", packed))
        if len(packed := chunks.get(b"gAMA", b"")) == 4:
            gamma = int.from_bytes(packed, "big")
            if gamma and gamma not in USUAL_GAMMA:
                curve = (100_000 / gamma,)
    if curve == SRGB_CURVE and (grey or np.allclose(primaries, SRGB, atol=0.0011)):
        return None
    try:
        return _written(primaries, curve, grey)
    except (np.linalg.LinAlgError, struct.error):  # no colours at all, or beyond all numbers: it costs no picture
        return UNKNOWN


def _written(primaries: Chromaticities, curve: tuple[float, ...], grey: bool) -> bytes:
    """A display profile of version 4."""
    tags = {b"desc": _text("as declared"), b"cprt": _text("none"), b"wtpt": b"XYZ \0\0\0\0" + _numbers(D50)}
    kind = 0 if len(curve) == 1 else 3
    tone = b"para\0\0\0\0" + struct.pack(">HH", kind, 0) + _numbers(curve)
    if grey:
        tags[b"kTRC"] = tone
    else:
        for name, column in zip((b"r", b"g", b"b"), _adapted(primaries).T, strict=True):
            tags |= {name + b"XYZ": b"XYZ \0\0\0\0" + _numbers(column), name + b"TRC": tone}
    place, index, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        index += name + struct.pack(">II", place + len(body), len(data))
        body += data.ljust(-(-len(data) // 4) * 4, b"\0")
    space = b"GRAY" if grey else b"RGB "
    head = b"\0\0\0\0\0\0\0\0\x04\x20\0\0mntr" + space + b"XYZ " + bytes(12) + b"acsp" + bytes(28) + _numbers(D50)
    whole = head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + index + body
    return struct.pack(">I", len(whole)) + whole[4:]


def _adapted(primaries: Chromaticities) -> NDArray[np.float64]:
    """Columns: XYZ of red, green and blue at full strength, seen under the light D50 of profiles (Bradford).

    Raises:
        LinAlgError: If they lie on a line, or there is no white.
    """
    places = np.array(primaries, float).reshape(4, 2)
    if not (places[:, 1] > 0).all():
        raise np.linalg.LinAlgError
    white, *colours = np.stack([places[:, 0], places[:, 1], 1 - places.sum(1)], 1) / places[:, 1:]
    columns = np.stack(colours, 1)
    seen = BRADFORD @ np.array(D50) / (BRADFORD @ white)
    adapt = np.linalg.inv(BRADFORD) @ np.diag(seen) @ BRADFORD
    result: NDArray[np.float64] = adapt @ columns @ np.diag(np.linalg.solve(columns, white))
    return result


def _numbers(values: tuple[float, ...] | NDArray[np.float64]) -> bytes:
    """Numbers as profiles hold them."""
    return b"".join(struct.pack(">i", round(float(value) * 65536)) for value in values)


def _text(text: str) -> bytes:
    return b"mluc\0\0\0\0" + struct.pack(">II2s2sII", 1, 12, b"en", b"US", 2 * len(text), 28) + text.encode("utf-16-be")
