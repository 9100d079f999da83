"""Writes `grids.bin` beside it: the points of ggml's grids, and records with what the public decoder says they stand for.

Needed only to make the fixture anew:
    pip install gguf
    python make_grids.py
`python make_grids.py --sets` prints the sets of points that `kernels/src/grouped/grids/sets.rs` has.

For each type, in the order of TYPES: its points, if it has a grid of its own, one signed byte for each number; then of
ROWS rows of one super-block the records, the scales, and 256 f32.
"""

import pathlib
import sys

import gguf
import numpy as np
from gguf import quants

HERE = pathlib.Path(__file__).parent
ROWS = 16
TYPES = ["IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M"]


def points(name):
    """Digits of the points of a grid, and what each digit stands for."""
    cls = getattr(quants, name)
    cls.init_grid()
    grid = cls.grid.reshape(cls.grid_shape)
    levels = [float(level) for level in cls.grid_map]
    return np.array([[levels.index(float(v)) for v in row] for row in grid]), np.array(levels)


def split(block, *widths):
    """The fields of blocks, each cut into what belongs to 32 columns."""
    fields, at = [], 0
    for width in widths:
        fields.append(block[:, at : at + 8 * width].reshape(len(block), 8, width))
        at += 8 * width
    return fields


def records_and_scales(name, block):
    """What `sluice_weights` calls the record of 32 columns, and the bytes of a row in the scale plane."""
    d, rest = block[:, :2], block[:, 2:]
    if name == "IQ3_S":
        indices, ninth, signs = split(rest, 8, 1, 4)
        return [indices, signs, ninth], [d, block[:, 106:]]
    if name == "IQ2_S":
        indices, signs, high = split(rest, 4, 4, 1)
        return [indices, signs, high], [d, block[:, 74:]]
    if name == "IQ2_XS":
        return split(rest, 8), [d, block[:, 66:]]
    if name == "IQ3_XXS":
        return split(rest, 8, 4), [d]
    if name == "IQ2_XXS":
        return split(rest, 8), [d]
    if name == "IQ1_S":
        return split(rest, 4, 2), [d]
    indices, high = split(block, 4, 2)
    words = block[:, 48:].copy().view(np.uint16)
    d = words[:, 0] >> 12 | words[:, 1] >> 12 << 4 | words[:, 2] >> 12 << 8 | words[:, 3] >> 12 << 12
    scales = np.stack([words & 63, words >> 6 & 63], axis=2).astype(np.uint8).reshape(len(block), 8)
    return [indices, high], [d.astype(np.uint16).reshape(-1, 1).view(np.uint8), scales]


def random_blocks(name, rng):
    """Random bytes, but for the scale of the super-block, which is small."""
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][1]
    block = rng.integers(0, 256, (ROWS, size), dtype=np.uint8)
    d = (rng.uniform(0.01, 0.1, ROWS) * rng.choice([-1, 1], ROWS)).astype(np.float16).view(np.uint16)
    if name == "IQ1_M":
        words = block[:, 48:].copy().view(np.uint16)
        for i in range(4):
            words[:, i] = words[:, i] & 0x0FFF | (d >> 4 * i & 15) << 12
        block[:, 48:] = words.view(np.uint8)
    else:
        block[:, :2] = d.reshape(-1, 1).view(np.uint8)
    return block


def fixture():
    rng = np.random.default_rng(17)
    for name in TYPES:
        if name != "IQ1_M":
            digits, levels = points(name)
            yield levels[digits].astype(np.int8).tobytes()
        block = random_blocks(name, rng)
        records, scales = records_and_scales(name, block)
        yield np.concatenate(records, axis=2).tobytes()
        yield np.concatenate(scales, axis=1).tobytes()
        values = gguf.dequantize(block, gguf.GGMLQuantizationType[name])
        yield values.astype("<f4").tobytes()


def print_sets():
    """Every grid is in ascending order of the number that its digits make, column 0 the lowest: so a set says it all."""
    for name in TYPES[:-1]:
        digits, levels = points(name)
        numbers = (digits * len(levels) ** np.arange(digits.shape[1])).sum(1)
        assert (np.diff(numbers) > 0).all()
        words = [0] * (len(levels) ** digits.shape[1] // 64 + (len(levels) == 3))
        for n in numbers.tolist():
            words[n // 64] |= 1 << n % 64
        print(f"pub(super) const {name.replace('_', '')}: [u64; {len(words)}] = [")
        for at in range(0, len(words), 5):
            print("    " + " ".join(f"0x{w:016x}," for w in words[at : at + 5]))
        print("];")


if "--sets" in sys.argv:
    print_sets()
else:
    (HERE / "grids.bin").write_bytes(b"".join(fixture()))
