#!/usr/bin/env python3
"""The same random mixture-of-experts weights in llama.cpp and in Sluice: decode and prefill, in turns, side by side.

    python3 tests/bench/llama_cpp.py --scratch DIR [--rounds N] [--types q8,q4] [--threads 2]

Builds nothing of Sluice: run `cargo build --release -p sluice` and `cargo build --release -p sluice-runtime --example
throughput` first, and give their folder with --bin (default target/release). The scratch folder, outside the repository,
gets a virtual environment with llama-cpp-python and gguf from PyPI and some gigabytes of weights; they are made once.

The model has the shape of Qwen3-MoE: hidden size 1024, 16 layers, 64 experts of width 512, 8 of them per token, 16 heads
and 4 key-value heads of 128, vocabulary 32768. All layers have the same random weights: speed does not depend on numbers,
and they are quantised once. Each program loads its file, runs once unmeasured, then --inner times measured; the programs
take turns, and medians are printed.
"""

import argparse
import json
import os
import statistics
import struct
import subprocess
import sys
import venv
from pathlib import Path

HIDDEN, LAYERS, EXPERTS, TOP_K, WIDTH, VOCAB = 1024, 16, 64, 8, 512, 32768
HEADS, KV_HEADS, HEAD_DIM, ROPE_BASE, EPS = 16, 4, 128, 1e6, 1e-6
PROMPT, DECODE = 128, 64
PAIRS = {"q8": ["Q8_0"], "q4": ["Q4_0"]}

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "torch_dtype": "bfloat16",
    "attention_bias": False, "decoder_sparse_step": 1, "head_dim": HEAD_DIM, "hidden_act": "silu",
    "hidden_size": HIDDEN, "intermediate_size": 4 * WIDTH, "max_position_embeddings": 4096, "mlp_only_layers": [],
    "moe_intermediate_size": WIDTH, "norm_topk_prob": True, "num_attention_heads": HEADS, "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K, "num_hidden_layers": LAYERS, "num_key_value_heads": KV_HEADS, "rms_norm_eps": EPS,
    "rope_scaling": None, "rope_theta": ROPE_BASE, "sliding_window": None, "tie_word_embeddings": False,
    "use_sliding_window": False, "vocab_size": VOCAB,
}


def layer_tensors():
    """Names in the checkpoint, names in GGUF, and shapes of the matrices of one layer, experts aside."""
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    return [
        ("self_attn.q_proj", "attn_q", (q, HIDDEN)), ("self_attn.k_proj", "attn_k", (kv, HIDDEN)),
        ("self_attn.v_proj", "attn_v", (kv, HIDDEN)), ("self_attn.o_proj", "attn_output", (HIDDEN, q)),
    ]


NORMS = [("input_layernorm", "attn_norm", HIDDEN), ("post_attention_layernorm", "ffn_norm", HIDDEN),
         ("self_attn.q_norm", "attn_q_norm", HEAD_DIM), ("self_attn.k_norm", "attn_k_norm", HEAD_DIM)]
EXPERT_PARTS = [("gate_proj", "ffn_gate_exps", (WIDTH, HIDDEN)), ("up_proj", "ffn_up_exps", (WIDTH, HIDDEN)),
                ("down_proj", "ffn_down_exps", (HIDDEN, WIDTH))]


def weights():
    """The weights of a layer and of the ends, rounded to bfloat16, as f32."""
    import numpy as np
    random = np.random.default_rng(1)

    def normal(*shape):
        x = random.standard_normal(shape, dtype=np.float32) * np.float32(1.0 / shape[-1] ** 0.5)
        return (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)

    made = {gguf: normal(*shape) for _, gguf, shape in layer_tensors()}
    made |= {gguf: normal(EXPERTS, *shape) for _, gguf, shape in EXPERT_PARTS}
    made |= {gguf: np.ones(width, np.float32) for _, gguf, width in NORMS}
    made["ffn_gate_inp"] = normal(EXPERTS, HIDDEN)
    made |= {"token_embd": normal(VOCAB, HIDDEN), "output": normal(VOCAB, HIDDEN)}
    return made


def write_checkpoint(folder, made):
    """Safetensors with the names of the hub."""
    import numpy as np
    entries = [("model.embed_tokens.weight", made["token_embd"]), ("lm_head.weight", made["output"]),
               ("model.norm.weight", np.ones(HIDDEN, np.float32))]
    for i in range(LAYERS):
        prefix = f"model.layers.{i}."
        entries += [(f"{prefix}{hub}.weight", made[gguf]) for hub, gguf, _ in layer_tensors() + NORMS]
        entries.append((f"{prefix}mlp.gate.weight", made["ffn_gate_inp"]))
        for e in range(EXPERTS):
            entries += [(f"{prefix}mlp.experts.{e}.{hub}.weight", made[gguf][e]) for hub, gguf, _ in EXPERT_PARTS]
    header, end = {}, 0
    for name, x in entries:
        header[name] = {"dtype": "BF16", "shape": list(x.shape), "data_offsets": [end, end + 2 * x.size]}
        end += 2 * x.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(exist_ok=True)
    with open(folder / "model.safetensors", "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for _, x in entries:
            out.write((x.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    (folder / "config.json").write_text(json.dumps(CONFIG))


def write_gguf(path, made, type_name):
    """The file that llama.cpp reads; norms and routers in f32, all other tensors in one type."""
    import gguf
    import numpy as np
    kind = gguf.GGMLQuantizationType[type_name]
    w = gguf.GGUFWriter(str(path), "qwen3moe")
    w.add_block_count(LAYERS)
    w.add_context_length(4096)
    w.add_embedding_length(HIDDEN)
    w.add_feed_forward_length(4 * WIDTH)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV_HEADS)
    w.add_key_length(HEAD_DIM)
    w.add_value_length(HEAD_DIM)
    w.add_layer_norm_rms_eps(EPS)
    w.add_rope_freq_base(ROPE_BASE)
    w.add_expert_count(EXPERTS)
    w.add_expert_used_count(TOP_K)
    w.add_expert_feed_forward_length(WIDTH)
    w.add_vocab_size(VOCAB)
    w.add_tokenizer_model("none")
    packed = {n: gguf.quants.quantize(x, kind) for n, x in made.items() if x.ndim > 1 and n != "ffn_gate_inp"}

    def add(name, source):
        if source in packed:
            w.add_tensor(name + ".weight", packed[source], raw_dtype=kind)
        else:
            w.add_tensor(name + ".weight", made[source])

    add("token_embd", "token_embd")
    add("output", "output")
    w.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for i in range(LAYERS):
        for name in made.keys() - {"token_embd", "output"}:
            add(f"blk.{i}.{name}", name)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def run_llama(path, threads, inner):
    """One line of JSON per measured run, as the other program prints them. Runs inside the virtual environment."""
    import time

    # Else this file, whose name is the package's, would import itself.
    sys.path = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]
    import llama_cpp as ll

    ll.llama_backend_init()
    model_params = ll.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model = ll.llama_model_load_from_file(str(path).encode(), model_params)
    assert model, "llama.cpp cannot load the model"
    params = ll.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 512, 512, 512
    params.n_threads = params.n_threads_batch = threads
    context = ll.llama_init_from_model(model, params)

    def decode(ids):
        array = (ll.llama_token * len(ids))(*ids)
        assert ll.llama_decode(context, ll.llama_batch_get_one(array, len(ids))) == 0
        ll.llama_get_logits_ith(context, -1)

    for i in range(inner + 1):
        ll.llama_memory_clear(ll.llama_get_memory(context), True)
        start = time.perf_counter()
        decode([(i * 7919 + 13) % VOCAB for i in range(PROMPT)])
        middle = time.perf_counter()
        for t in range(DECODE):
            decode([(t * 104729 + 7) % VOCAB])
        end = time.perf_counter()
        if i > 0:
            print(json.dumps({"prefill": PROMPT / (middle - start), "decode": DECODE / (end - middle)}), flush=True)


def lines(command):
    # llama.cpp talks on standard error: only worth reading when it fails.
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}:\n{result.stderr[-2000:]}")
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def prepare(args):
    """Everything that is made once: environment, weights, conversions."""
    scratch = args.scratch
    scratch.mkdir(parents=True, exist_ok=True)
    python = scratch / "venv/bin/python"
    if not python.exists():
        venv.create(scratch / "venv", with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "llama-cpp-python", "gguf", "numpy"], check=True)
    names = [name for ours in args.types for name in PAIRS[ours]]
    if not (scratch / "checkpoint/config.json").exists() or not all((scratch / f"{n}.gguf").exists() for n in names):
        subprocess.run([python, __file__, "--make", scratch, "--types", ",".join(args.types)], check=True)
    for ours in args.types:
        path = scratch / f"{ours}.sluice"
        if not path.exists():
            command = [args.bin / "sluice", "convert", scratch / "checkpoint", path, "--type", ours, "--dense-type", ours]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return python


def compare(args):
    python = prepare(args)
    for ours in args.types:
        for theirs in PAIRS[ours]:
            results = {"sluice": [], "llama.cpp": []}
            for _ in range(args.rounds):
                model = args.scratch / f"{ours}.sluice"
                command = [args.bin / "examples/throughput", model, args.threads, PROMPT, DECODE, args.inner]
                results["sluice"] += lines(command)
                command = [python, __file__, "--llama", args.scratch / f"{theirs}.gguf", "--threads", args.threads]
                results["llama.cpp"] += lines(command + ["--inner", args.inner])
            for what in ["decode", "prefill"]:
                a, b = (statistics.median(r[what] for r in results[side]) for side in ["sluice", "llama.cpp"])
                print(f"{what:8} sluice {ours} {a:8.1f} tokens/s   llama.cpp {theirs} {b:8.1f} tokens/s   {a / b:.2f}x")
            sys.stdout.flush()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--scratch", type=Path, help="folder outside the repository")
    p.add_argument("--bin", type=Path, default=Path("target/release"), help="folder of the release build")
    p.add_argument("--types", type=lambda s: s.split(","), default=["q8", "q4"])
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=5, help="turns of each program")
    p.add_argument("--inner", type=int, default=3, help="measured runs per turn")
    p.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    p.add_argument("--llama", type=Path, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.make:
        made = weights()
        write_checkpoint(args.make / "checkpoint", made)
        for name in [name for ours in args.types for name in PAIRS[ours]]:
            write_gguf(args.make / f"{name}.gguf", made, name)
    elif args.llama:
        run_llama(args.llama, args.threads, args.inner)
    elif args.scratch:
        args.scratch = args.scratch.resolve()
        compare(args)
    else:
        p.error("give a scratch folder outside the repository with --scratch")


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "active")
    main()
