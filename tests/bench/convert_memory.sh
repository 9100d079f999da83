#!/usr/bin/env bash
# Peak memory of a conversion against the size of the checkpoint: it must not grow.
#   tests/bench/convert_memory.sh [SCRATCH FOLDER] [TYPE]
set -euo pipefail
cd "$(dirname "$0")/../.."
scratch=$(mktemp -d "${1:-${TMPDIR:-/tmp}}/sluice-convert.XXXXXX")
type=${2:-q8}
trap 'rm -rf "$scratch"' EXIT
cargo build --release -q -p sluice
cargo build --release -q -p sluice-converter --example make_checkpoint
target=${CARGO_TARGET_DIR:-target}/release

for layers in 4 20; do
    "$target/examples/make_checkpoint" "$scratch/checkpoint" "$layers"
    "$target/sluice" convert "$scratch/checkpoint" "$scratch/model.sluice" --type "$type" --dense-type "$type" \
        --overwrite >/dev/null &
    pid=$!
    peak=0
    while status=$(cat "/proc/$pid/status" 2>/dev/null) && [ -d "/proc/$pid" ]; do
        now=$(awk '/^VmHWM/ {print $2}' <<<"$status")
        [ "${now:-0}" -gt "$peak" ] && peak=$now
        sleep 0.02
    done
    wait "$pid"
    size=$(stat -c %s "$scratch/checkpoint/model.safetensors")
    printf '%4d MB of checkpoint: peak resident memory %d MB\n' "$((size / 1000000))" "$((peak / 1000))"
done
