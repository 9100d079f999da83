#!/usr/bin/env bash
# What several drives gain: a model in one file against the same model striped over folders, in alternating rounds of
# `sluice bench decode`.
#
#   tests/bench/volumes.sh --simulated [MODEL]       two drives that are only simulated, on any machine
#   tests/bench/volumes.sh MODEL DIR1 DIR2 [...]     your own drives: MODEL lies on one of them, the volumes go into the folders
#
# Without MODEL, a model of random weights is made (a few hundred MB). With your own drives, measure each first (`sluice bench disk DIR`), so
# that shares fit them. The volumes are removed afterwards.
#
# BUDGET (of memory; default: the least and a sixth of the rest if drives are simulated, else half more than the least), TOKENS (32), ROUNDS
# (5), DRIVE (200MB/s,80us: slow enough to be the limit on any machine) and SLUICE (target/release/sluice) come from the environment. Needs jq.
set -euo pipefail
export LC_ALL=C

readonly TOKENS=${TOKENS:-32} ROUNDS=${ROUNDS:-5} DRIVE=${DRIVE:-200MB/s,80us}
root=$(cd "$(dirname "$0")/../.." && pwd)
readonly SLUICE=${SLUICE:-${CARGO_TARGET_DIR:-$root/target}/release/sluice}

fail() {
    printf 'volumes: %s\n' "$*" >&2
    exit 1
}

command -v jq >/dev/null || fail "install jq"
[ -x "$SLUICE" ] || fail "build it first: cargo build --release -p sluice"
[ $# -ge 1 ] || fail "name --simulated, or a model and two folders"
scratch=$(mktemp -d "${TMPDIR:-/tmp}/sluice-volumes.XXXXXX")
trap 'rm -rf -- "$scratch" "${made[@]:-}"' EXIT
made=()
simulated=()
if [ "$1" = --simulated ]; then
    simulated=(--drive "$DRIVE")
    model=${2:-$scratch/model.sluice}
    [ -e "$model" ] || "$SLUICE" synth qwen3-30b "$model" --layers 4 --type q4 --dense-type q8 >/dev/null
    mkdir "$scratch/a" "$scratch/b"
    folders=("$scratch/a" "$scratch/b")
    shares=(--shares "1,1")
else
    [ $# -ge 3 ] || fail "name a model and two folders"
    model=$1
    folders=("${@:2}")
    shares=()
fi
list=$(IFS=,; printf '%s' "${folders[*]}")
json=$("$SLUICE" restripe "$model" --volumes "$list" "${shares[@]}" --json)
mapfile -t made < <(jq -r '.files[]' <<<"$json")
facts=$("$SLUICE" inspect "$model" --json)
if [ ${#simulated[@]} -gt 0 ]; then
    # Few experts fit, so that the drives are the limit, as they are for models that need several.
    budget=${BUDGET:-$(jq '.least_budget + (.file_bytes - .least_budget) / 6 | floor' <<<"$facts")}
else
    budget=${BUDGET:-$(jq '.least_budget * 3 / 2 | floor' <<<"$facts")}
fi

# Tokens per second, and bytes per second that were read meanwhile.
decode() {
    "$SLUICE" bench decode "$1" --budget "$budget" -n "$TOKENS" "${simulated[@]}" --json |
        jq -r '.[0] | "\(.tokens_per_second) \(.achieved // .drive.reached_bytes_per_second)"'
}

median() {
    sort -g | awk '{ value[NR] = $1 } END { print NR % 2 ? value[(NR + 1) / 2] : (value[NR / 2] + value[NR / 2 + 1]) / 2 }'
}

printf '%-8s %12s %12s %8s %12s %12s %8s\n' round "one tok/s" "striped" ratio "one MB/s" striped ratio
for round in $(seq "$ROUNDS"); do
    read -r one_tokens one_rate < <(decode "$model")
    read -r all_tokens all_rate < <(decode "${made[0]}")
    awk -v r="$round" -v a="$one_tokens" -v b="$all_tokens" -v c="$one_rate" -v d="$all_rate" \
        'BEGIN { printf "%-8s %12.2f %12.2f %8.2f %12.0f %12.0f %8.2f\n", r, a, b, b / a, c / 1e6, d / 1e6, d / c }' |
        tee -a "$scratch/rounds"
done
printf 'medians: tokens %.2f times, rate %.2f times\n' "$(awk '{ print $4 }' "$scratch/rounds" | median)" \
    "$(awk '{ print $7 }' "$scratch/rounds" | median)"
