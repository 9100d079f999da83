#!/usr/bin/env python3
"""The same random mixture-of-experts weights in llama.cpp and in Sluice: speed and logits, side by side.

    python3 tests/bench/llama_cpp.py --scratch DIR [--rounds N] [--types q8,q4] [--threads 2] [--prompts 128,1024]
        [--llama-bench PROGRAM [--llama-bench-options=-rtr,1]]

Builds nothing of Sluice: run `cargo build --release -p sluice` and `cargo build --release -p sluice-model --example
throughput` first, and give their folder with --bin (default target/release). The scratch folder, outside the repository,
gets a virtual environment with llama-cpp-python and gguf from PyPI, which compiles llama.cpp for this processor (minutes;
needs a C++ compiler), and model files, all made once: 7 GB, and up to 11 GB while they are made, or with one of the types
at a time, in different folders, 4 and 7 GB.

The model has the shape of Qwen3-MoE: hidden size 1024, 16 layers, 64 experts of width 512, 8 of them per token, 16 heads
and 4 key-value heads of 128, vocabulary 32768. All layers have the same random weights: speed does not depend on numbers.
Both programs get them in 16 bits, and each quantises them itself: llama.cpp to Q8_0 and Q4_0 throughout, as ours are, and
to the mixture that it calls Q4_K_M.

Logits of one prompt, before any quantising, say whether both compute the same model; then those of every type, against
those of Sluice in 16 bits, what it loses. Random weights say little about trained ones. For speed, each program loads its
file, runs once unmeasured, then --inner times measured; the programs take turns, and medians are printed, with the range of
all runs. --json adds every run. --llama-bench names the `llama-bench` of ik_llama.cpp, which then takes
turns with the two on the same GGUF files; what it generates follows a prompt (its `-gp`), as with the others.

    python3 tests/bench/llama_cpp.py --scratch OTHER --layers 2 --source F32 --types '' --rounds 0

compares logits of a smaller model whose weights llama.cpp holds in f32, so that neither program rounds activations.
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

HIDDEN, EXPERTS, TOP_K, WIDTH, VOCAB = 1024, 64, 8, 512, 32768
HEADS, KV_HEADS, HEAD_DIM, ROPE_BASE, EPS = 16, 4, 128, 1e6, 1e-6
PROMPT, DECODE = 128, 64
PAIRS = {"q8": ["Q8_0"], "q4": ["Q4_0", "Q4_K_M"]}

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "torch_dtype": "bfloat16",
    "attention_bias": False, "decoder_sparse_step": 1, "head_dim": HEAD_DIM, "hidden_act": "silu",
    "hidden_size": HIDDEN, "intermediate_size": 4 * WIDTH, "max_position_embeddings": 4096, "mlp_only_layers": [],
    "moe_intermediate_size": WIDTH, "norm_topk_prob": True, "num_attention_heads": HEADS, "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K, "num_key_value_heads": KV_HEADS, "rms_norm_eps": EPS,
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


def write_checkpoint(folder, made, layers):
    """Safetensors with the names of the hub."""
    import numpy as np
    entries = [("model.embed_tokens.weight", made["token_embd"]), ("lm_head.weight", made["output"]),
               ("model.norm.weight", np.ones(HIDDEN, np.float32))]
    for i in range(layers):
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
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))


def write_gguf(path, made, layers, type_name):
    """The file that llama.cpp reads and quantises: F32, F16 or BF16, norms and routers in f32 always."""
    import gguf
    import numpy as np
    kind = gguf.GGMLQuantizationType[type_name]
    w = gguf.GGUFWriter(str(path), "qwen3moe")
    w.add_block_count(layers)
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
    w.add_file_type(gguf.LlamaFileType["ALL_F32" if type_name == "F32" else f"MOSTLY_{type_name}"])
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
    for i in range(layers):
        for name in made.keys() - {"token_embd", "output"}:
            add(f"blk.{i}.{name}", name)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def llama():
    """The bindings. Everything that calls this runs inside the virtual environment."""
    # Else this file, whose name is the package's, would import itself.
    sys.path = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]
    import llama_cpp
    llama_cpp.llama_backend_init()
    return llama_cpp


def prompt(tokens=PROMPT):
    """Token ids without meaning; the program that measures ours makes the same."""
    return [(i * 7919 + 13) % VOCAB for i in range(tokens)]


def open_llama(ll, path, threads, **options):
    """A context with the model in memory, on the CPU, for 512 tokens."""
    model_params = ll.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model = ll.llama_model_load_from_file(str(path).encode(), model_params)
    assert model, "llama.cpp cannot load the model"
    params = ll.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 512, 512, 512
    params.n_threads = params.n_threads_batch = threads
    for name, value in options.items():
        setattr(params, name, value)
    return ll.llama_init_from_model(model, params)


def time_llama(path, threads, inner, tokens):
    """One line of JSON per measured run, in tokens/s, as the other program prints them."""
    import time
    ll = llama()
    ids, room = prompt(int(tokens)), int(tokens) + DECODE
    context = open_llama(ll, path, int(threads), n_ctx=max(512, room + 16), n_batch=max(512, room))

    def decode(ids):
        array = (ll.llama_token * len(ids))(*ids)
        assert ll.llama_decode(context, ll.llama_batch_get_one(array, len(ids))) == 0
        ll.llama_get_logits_ith(context, -1)

    for i in range(int(inner) + 1):
        ll.llama_memory_clear(ll.llama_get_memory(context), True)
        start = time.perf_counter()
        decode(ids)
        middle = time.perf_counter()
        for t in range(DECODE):
            decode([(t * 104729 + 7) % VOCAB])
        end = time.perf_counter()
        if i > 0:
            print(json.dumps({"prefill": len(ids) / (middle - start), "decode": DECODE / (end - middle)}), flush=True)


def time_streamed(path, threads, ids, tokens):
    """One line of JSON: tokens/s of a prompt and of an answer in a process that has just opened the file, as `peers.py` wants it."""
    import time
    ll = llama()
    ids, tokens = [int(i) for i in ids.split(",")], int(tokens)
    context = open_llama(ll, path, int(threads), n_ctx=len(ids) + tokens + 16)

    def decode(ids):
        array = (ll.llama_token * len(ids))(*ids)
        assert ll.llama_decode(context, ll.llama_batch_get_one(array, len(ids))) == 0
        row = ll.llama_get_logits_ith(context, -1)
        return max(range(0, VOCAB, 97), key=lambda i: row[i])

    start = time.perf_counter()
    token = decode(ids)
    middle = time.perf_counter()
    for _ in range(tokens):
        token = decode([token])
    end = time.perf_counter()
    print(json.dumps({"prefill": len(ids) / (middle - start), "decode": tokens / (end - middle)}), flush=True)


def llama_logits(path, threads, out):
    """Writes the logits of every position of the prompt: f32, [tokens, vocabulary].

    Keys and values are kept in f32, and attention is the plain one: flash attention is 4e-4 away, about as f16 would be.
    """
    import numpy as np
    ll = llama()
    f32, flash = 0, ll.LLAMA_FLASH_ATTN_TYPE_DISABLED  # GGML_TYPE_F32
    context = open_llama(ll, path, int(threads), type_k=f32, type_v=f32, flash_attn_type=flash)
    batch = ll.llama_batch_init(PROMPT, 0, 1)
    batch.n_tokens = PROMPT
    for i, token in enumerate(prompt()):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
    assert ll.llama_decode(context, batch) == 0
    np.save(out, np.stack([np.ctypeslib.as_array(ll.llama_get_logits_ith(context, i), (VOCAB,)) for i in range(PROMPT)]))


def quantise(source, target, type_name):
    """Quantises a GGUF with llama.cpp: _0 types throughout, output and embedding included; others as it mixes them."""
    ll = llama()
    params = ll.llama_model_quantize_default_params()
    params.ftype = getattr(ll, f"LLAMA_FTYPE_MOSTLY_{type_name}")
    params.pure = type_name.endswith("_0")
    part = target + ".part"
    assert ll.llama_model_quantize(source.encode(), part.encode(), params) == 0, "llama.cpp cannot quantise"
    os.rename(part, target)


def census(path):
    """Prints how many weights a GGUF holds in each type, as JSON; vectors and routers, all f32, aside."""
    import gguf
    counts = {}
    for t in gguf.GGUFReader(path).tensors:
        if len(t.shape) > 1 and "gate_inp" not in t.name:
            counts[t.tensor_type.name] = counts.get(t.tensor_type.name, 0) + int(t.n_elements)
    print(json.dumps(counts))


def differences(reference, other):
    """Prints how far logits are from the reference, as JSON.

    largest: of the differences, divided by the largest logit; median: the median over positions of the same. rms: root mean
    square of the differences, divided by that of the logits. divergence: mean Kullback-Leibler divergence from what the
    reference says, in nats. top1: share of the positions where both put the same token first.
    """
    import numpy as np
    a, b = (np.load(path).astype(np.float64) for path in [reference, other])

    def log_softmax(x):
        x = x - x.max(1, keepdims=True)
        return x - np.log(np.exp(x).sum(1, keepdims=True))

    p, q, rows = log_softmax(a), log_softmax(b), np.abs(a - b).max(1) / np.abs(a).max()
    print(json.dumps({
        "largest": float(rows.max()),
        "median": float(np.median(rows)),
        "rms": float(((a - b) ** 2).mean() ** 0.5 / (a ** 2).mean() ** 0.5),
        "divergence": float((np.exp(p) * (p - q)).sum(1).mean()),
        "top1": float((a.argmax(1) == b.argmax(1)).mean()),
    }))


def make(what, path, layers, source):
    """Writes the weights where the one or the other program reads them."""
    if what == "checkpoint":
        write_checkpoint(Path(path), weights(), int(layers))
    else:
        write_gguf(Path(path), weights(), int(layers), source)


INSIDE = {f.__name__: f for f in [make, time_llama, time_streamed, llama_logits, quantise, census, differences]}


def printed(command):
    """Runs a program; what it printed. All talk on standard error, which is only worth reading on failure."""
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}:\n{result.stderr[-2000:]}")
    return result.stdout


def lines(command):
    """Runs a program; the lines of JSON that it printed."""
    return [json.loads(line) for line in printed(command).splitlines() if line.startswith("{")]


def install(folder):
    """Python of a virtual environment with what this needs, made once: llama.cpp is compiled for this very processor."""
    python = folder / "bin/python"
    # Asked for by importing: an installation that was interrupted is repaired.
    check = [python, "-c", "import llama_cpp, gguf, numpy"]
    if not python.exists() or subprocess.run(check, cwd=folder, stderr=subprocess.DEVNULL).returncode != 0:
        venv.create(folder, with_pip=True)
        # A wheel would be built for any processor. OpenMP and repacking at load time are what llama.cpp does by default.
        flags = "-DGGML_NATIVE=ON -DGGML_OPENMP=ON -DGGML_CPU_REPACK=ON -DLLAVA_BUILD=OFF " + os.environ.get("CMAKE_ARGS", "")
        pip = [python, "-m", "pip", "install", "-q", "--no-binary", "llama-cpp-python", "llama-cpp-python", "gguf", "numpy"]
        subprocess.run(pip, env=os.environ | {"CMAKE_ARGS": flags}, check=True)
        subprocess.run(check, cwd=folder, check=True)
    return python


class Scratch:
    """Files in the scratch folder, each made when it is first asked for."""

    def __init__(self, args):
        self.folder, self.bin, self.threads, self.layers, self.source = (
            args.scratch, args.bin, args.threads, args.layers, args.source)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.python = install(self.folder / "venv")

    def inside(self, function, *args):
        """Runs a function of this file in the virtual environment."""
        return lines([self.python, __file__, "--inside", function, *args])

    def checkpoint(self):
        path = self.folder / "checkpoint"
        if not (path / "config.json").exists():
            self.inside("make", "checkpoint", path, self.layers, self.source)
        return path

    def sluice(self, type_name):
        path = self.folder / f"{type_name}.sluice"
        if not path.exists():
            types = ["--type", type_name, "--dense-type", type_name]
            lines([self.bin / "sluice", "convert", self.checkpoint(), path, *types])
        return path

    def gguf(self, type_name):
        path = self.folder / f"{type_name}.gguf"
        if not path.exists() and type_name == self.source:
            part = path.with_suffix(".part")
            self.inside("make", "gguf", part, self.layers, self.source)
            part.rename(path)
        elif not path.exists():
            self.inside("quantise", self.gguf(self.source), path, type_name)
        return path

    def sluice_logits(self, type_name, *options):
        out = self.folder / f"sluice-{type_name}{''.join(options)}.npy"
        if not out.exists():
            ids = ",".join(map(str, prompt()))
            lines([self.bin / "sluice", "logits", self.sluice(type_name), "--ids", ids, "--out", out, *options])
        return out

    def llama_logits(self, type_name):
        out = self.folder / f"llama-{type_name}.npy"
        if not out.exists():
            self.inside("llama_logits", self.gguf(type_name), self.threads, out)
        return out

    def forget(self, *names):
        """Large files that others were made of go as soon as they are not needed."""
        for name in names:
            (self.folder / name).unlink(missing_ok=True)


def prepare(scratch, types):
    """Makes all files that are missing; the order keeps few of the large ones at a time. Gives the logits in 16 bits."""
    ours = scratch.sluice_logits("bf16", "--exact")
    scratch.forget("bf16.sluice")
    for type_name in types:
        scratch.sluice(type_name)
    scratch.forget("checkpoint/config.json", "checkpoint/model.safetensors")
    theirs = scratch.llama_logits(scratch.source)
    for type_name in types:
        for name in PAIRS[type_name]:
            scratch.gguf(name)
    scratch.forget(f"{scratch.source}.gguf")
    return ours, theirs


def weight_count(layers):
    """Weights in matrices, routers aside."""
    layer = sum(rows * cols for _, _, (rows, cols) in layer_tensors())
    experts = EXPERTS * sum(rows * cols for _, _, (rows, cols) in EXPERT_PARTS)
    return layers * (layer + experts) + 2 * VOCAB * HIDDEN


def compare_logits(scratch, types, reference, theirs):
    """Prints how far the programs are from each other, and every type from the weights as they were."""
    def show(name, file, logits):
        bits = f"{8 * file.stat().st_size / weight_count(scratch.layers):.2f} bits per weight" if file else ""
        d = scratch.inside("differences", reference, logits)[0]
        print(f"{name:18}{bits:22}largest difference {d['largest']:.1e} (median position {d['median']:.1e}), rms {d['rms']:.1e}, "
              f"divergence {d['divergence']:.1e} nats, same first token {100 * d['top1']:.0f} %", flush=True)

    print(f"Logits of {PROMPT} positions beside sluice bf16 with f32 activations:")
    show(f"llama.cpp {scratch.source}", None, theirs)
    for type_name in types:
        show(f"sluice {type_name}", scratch.sluice(type_name), scratch.sluice_logits(type_name))
        for name in PAIRS[type_name]:
            show(f"llama.cpp {name}", scratch.gguf(name), scratch.llama_logits(name))
    for name in [name for type_name in types for name in PAIRS[type_name]]:
        counts = scratch.inside("census", scratch.gguf(name))[0]
        print(f"{name}: " + ", ".join(f"{100 * n / sum(counts.values()):.1f} % {t}" for t, n in counts.items()))


def time_llama_bench(program, options, path, threads, tokens, inner):
    """What a `llama-bench` prints for one prompt, and for the tokens generated behind it, as the other programs print them."""
    command = [program, "-m", path, "-t", threads, "-r", inner, "-o", "json", *options]
    rates = {}
    for what, test in [("prefill", ["-p", tokens, "-n", 0]), ("decode", ["-p", 0, "-n", 0, "-gp", f"{tokens},{DECODE}"])]:
        out = printed([*command, *test])
        # It may write a line of its own before the list.
        [found] = json.loads(out[out.index("[\n"):])
        rates[what] = found["samples_ts"]
    return [{"prefill": prefill, "decode": decode} for prefill, decode in zip(rates["prefill"], rates["decode"])]


def compare_speed(scratch, type_name, name, tokens, args):
    """All programs in turns; prints medians in tokens/s, ranges and the ratio of medians."""
    ours = [args.bin / "examples/throughput", scratch.sluice(type_name), args.threads, tokens, DECODE, args.inner]
    results = {"sluice": [], "llama.cpp": []}
    if args.llama_bench:
        results["llama-bench"] = []
    for _ in range(args.rounds):
        results["sluice"] += lines(ours)
        results["llama.cpp"] += scratch.inside("time_llama", scratch.gguf(name), args.threads, args.inner, tokens)
        if args.llama_bench:
            results["llama-bench"] += time_llama_bench(
                args.llama_bench, args.llama_bench_options, scratch.gguf(name), args.threads, tokens, args.inner)
    for what in ["decode", "prefill"]:
        runs = {side: sorted(r[what] for r in rows) for side, rows in results.items()}
        line = f"{what:8} prompt of {tokens}, tokens/s"
        for side, r in runs.items():
            label = {"sluice": type_name}.get(side, name)
            line += f"   {side} {label} {statistics.median(r):.1f} ({r[0]:.1f} to {r[-1]:.1f})"
            if side != "sluice":
                line += f" {statistics.median(runs['sluice']) / statistics.median(r):.2f}x"
        print(line, flush=True)
    if args.json:
        print(json.dumps({"pair": [type_name, name], "prompt": tokens} | results), flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--scratch", type=lambda s: Path(s).resolve(), help="folder outside the repository")
    p.add_argument("--bin", type=Path, default=Path("target/release"), help="folder of the release build")
    p.add_argument("--types", type=lambda s: [t for t in s.split(",") if t], default=["q8", "q4"])
    p.add_argument("--source", choices=["F32", "F16", "BF16"], default="F16", help="what llama.cpp quantises")
    p.add_argument("--layers", type=int, default=16)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=12, help="turns of each program; 0 compares logits only")
    p.add_argument("--prompts", type=lambda s: [int(n) for n in s.split(",")], default=[PROMPT], help="lengths of prompts, for speed")
    p.add_argument("--llama-bench", type=Path, metavar="PROGRAM", help="ik_llama.cpp's llama-bench, measured too")
    p.add_argument("--llama-bench-options", type=lambda s: s.split(","), default=[], metavar="A,B", help="more arguments for it")
    p.add_argument("--inner", type=int, default=2, help="measured runs per turn")
    p.add_argument("--json", action="store_true", help="print every run as well")
    p.add_argument("--inside", nargs="+", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.inside:
        INSIDE[args.inside[0]](*args.inside[1:])
    elif args.scratch:
        # Found out now, not after ten minutes of compiling.
        needed = ["sluice"] + ["examples/throughput"] * bool(args.types and args.rounds)
        missing = [str(args.bin / name) for name in needed if not (args.bin / name).exists()]
        if missing:
            p.error(f"not built: {', '.join(missing)}; the beginning of this file says how")
        scratch = Scratch(args)
        compare_logits(scratch, args.types, *prepare(scratch, args.types))
        for type_name in args.types if args.rounds else []:
            for name in PAIRS[type_name]:
                for tokens in args.prompts:
                    compare_speed(scratch, type_name, name, tokens, args)
    else:
        p.error("give a scratch folder outside the repository with --scratch")


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "active")
    main()
