#!/usr/bin/env python3
"""Writes blocks.safetensors: random blocks of ggml's types, and their values by the public `gguf` package.

    pip install gguf numpy safetensors && python3 make_blocks.py

For each type there are `TYPE.blocks`, bytes, and `TYPE.values`, f32. Codes are random bits; scales are f16 numbers of all
magnitudes and both signs, subnormal ones among them, as `gguf` and this program know them.
"""

from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as T
from gguf.quants import dequantize
from safetensors.numpy import save_file

#: Byte offsets of the f16 numbers of a block.
HALVES = {
    T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q8_0: [0],
    T.Q2_K: [80, 82], T.Q3_K: [108], T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208],
    T.IQ4_NL: [0], T.IQ4_XS: [0], T.IQ3_S: [0], T.IQ3_XXS: [0], T.IQ2_S: [0], T.IQ2_XS: [0], T.IQ2_XXS: [0], T.IQ1_S: [0],
    T.IQ1_M: [], T.TQ1_0: [52], T.TQ2_0: [64], T.MXFP4: [], T.NVFP4: [],
}


def half(rng: np.random.Generator) -> np.ndarray:
    """An f16 number, finite, of any magnitude."""
    sign, exponent, mantissa = rng.integers(2), rng.integers(0, 31), rng.integers(1024)
    return np.array([sign << 15 | exponent << 10 | mantissa], np.uint16)


def blocks(rng: np.random.Generator, ty: T, count: int) -> np.ndarray:
    out = rng.integers(0, 256, (count, GGML_QUANT_SIZES[ty][1]), dtype=np.uint8)
    for block in out:
        for at in HALVES[ty]:
            block[at:at + 2] = half(rng).view(np.uint8)
        if ty == T.IQ1_M:
            # The scale is cut into the top four bits of four words.
            words, d = block[48:56].view(np.uint16), int(half(rng)[0])
            for i in range(4):
                words[i] = words[i] & 0x0FFF | (d >> 4 * i & 15) << 12
        if ty == T.MXFP4:
            # Powers whose values are finite.
            block[0] = rng.integers(0, 250)
        if ty == T.NVFP4:
            # Scales have no sign.
            block[:4] &= 0x7F
    return out


def main() -> None:
    rng = np.random.default_rng(17)
    tensors = {}
    for ty in HALVES:
        count = 4 if GGML_QUANT_SIZES[ty][0] == 256 else 16
        data = blocks(rng, ty, count)
        tensors[f"{ty.name}.blocks"] = data
        tensors[f"{ty.name}.values"] = dequantize(data, ty).astype(np.float32)
    save_file(tensors, Path(__file__).with_name("blocks.safetensors"))


main()
