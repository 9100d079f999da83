#!/usr/bin/env python3
"""Runs llama.cpp's converter on the golden checkpoints and keeps the heads of the files that it writes.

    python3 make_heads.py LLAMA_CPP

`LLAMA_CPP` is a folder of https://github.com/ggml-org/llama.cpp with its Python requirements installed. For each family,
NAME.head gets the file's bytes up to the data, and behind them the data of the few tensors whose numbers depend on how a
library rounds its exponential. `digests.json` gets the xxh3-128 of the whole files: the test writes them again from the golden
checkpoints, and what it has written must be what llama.cpp wrote, byte for byte.

Golden checkpoints have no tokenizer, so that step is left out. What GGUF cannot say is taken out of their configurations first
(`EDITS`; the test does the same).
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
GOLDEN = HERE.parents[2] / "tests/fixtures/golden"

FAMILIES = [
    "deepseek_v2", "deepseek_v2_lite", "deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_air", "glm4_moe_lite",
    "glm_moe_dsa", "gpt_oss", "gpt_oss_mxfp4", "kimi_k2", "llama", "minimax_m2", "mistral", "mixtral", "olmoe", "qwen3",
    "qwen3_5_moe", "qwen3_moe", "qwen3_next",
]

EDITS = {
    "deepseek_v2": {"rope_scaling": {"mscale": 1.0}},
    "gpt_oss": {"swiglu_limit": 7.0},
    "mistral": {"sliding_window": None},
    "olmoe": {"clip_qkv": None, "rms_norm_eps": 1e-5},
}

#: Further arguments of the converter.
ARGUMENTS = {"qwen3_next": ["--no-nextn"]}

#: Tensors whose data are kept, by what their names end with.
KEPT = (".ssm_a", "rope_freqs.weight")

RUN = """
import sys, runpy
sys.path.insert(0, {llama_cpp!r})
import conversion
from conversion import base
conversion.load_all_models()
def without_vocabulary(cls):
    for sub in cls.__subclasses__():
        sub.set_vocab = lambda self: None
        without_vocabulary(sub)
without_vocabulary(base.TextModel)
sys.argv = ["convert_hf_to_gguf.py"] + sys.argv[1:]
runpy.run_path({script!r}, run_name="__main__")
"""

def edit(config: dict, changes: dict) -> None:
    for key, value in changes.items():
        if isinstance(value, dict):
            edit(config[key], value)
        else:
            config[key] = value

def convert(llama_cpp: Path, family: str, out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / family
        source.mkdir()
        for file in (GOLDEN / family).iterdir():
            if not file.name.startswith("golden"):
                shutil.copyfile(file, source / file.name)
        config = json.loads((source / "config.json").read_text())
        edit(config, EDITS.get(family, {}))
        (source / "config.json").write_text(json.dumps(config))
        run = RUN.format(llama_cpp=str(llama_cpp), script=str(llama_cpp / "convert_hf_to_gguf.py"))
        arguments = [str(source), "--outtype", "f32", "--model-name", family, "--outfile", str(out)]
        subprocess.run([sys.executable, "-c", run, *arguments, *ARGUMENTS.get(family, [])], cwd=llama_cpp, check=True)

def main() -> None:
    llama_cpp = Path(sys.argv[1]).resolve()
    sys.path.insert(0, str(llama_cpp / "gguf-py"))
    import xxhash
    from gguf import GGUFReader

    digests = {}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "model.gguf"
            convert(llama_cpp, family, out)
            reader, data = GGUFReader(out), out.read_bytes()
            head = data[: reader.data_offset]
            for tensor in reader.tensors:
                if tensor.name.endswith(KEPT):
                    head += tensor.data.tobytes()
            (HERE / f"{family}.head").write_bytes(head)
            digests[family] = xxhash.xxh3_128(data).hexdigest()
    (HERE / "digests.json").write_text(json.dumps(digests, indent=1) + os.linesep)

main()
