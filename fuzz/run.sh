#!/usr/bin/env bash
# Fuzzes the parsers. See CONTRIBUTING.md.
set -euo pipefail
readonly CALLED_FROM=$PWD
cd "$(dirname "$0")"

readonly TARGETS=(model rewrite journal batch header index config tokenizer template importance counts session trace gguf calibration)

# Further options of libFuzzer, such as -seed=1.
read -ra OPTIONS <<<"${SLUICE_FUZZ_OPTIONS:-}"

usage() {
    cat <<EOF
usage: fuzz/run.sh SECONDS [TARGET...]   fuzzes each target, or those named, for so many seconds
       fuzz/run.sh replay TARGET FILE... runs a target once with each file, such as one in fuzz/findings/TARGET

Targets: ${TARGETS[*]}

A run may not panic, abort, take 10 seconds, or 1 GiB of memory. What does is kept in fuzz/findings/TARGET, and goes to
fuzz/regressions/TARGET once it is mended: these are replayed first, every time. fuzz/corpus/TARGET keeps what was found to
reach new code, for the next time. SLUICE_FUZZ_OPTIONS has further options for libFuzzer, such as -seed=1.
EOF
}

fail() {
    printf 'fuzz: %s\n' "$*" >&2
    exit 1
}

build() {
    RUSTC_WRAPPER=$PWD/rustc.sh cargo build --release
    binary=$PWD/target/release/sluice-fuzz
}

# Files of the targets lie in memory where that is possible, and vanish in the end.
scratch() {
    local place=${TMPDIR:-/tmp}
    if [ -d /dev/shm ] && [ -w /dev/shm ]; then place=/dev/shm; fi
    TMPDIR=$(mktemp -d "$place/sluice-fuzz.XXXXXX")
    export TMPDIR
    trap 'rm -rf "$TMPDIR"' EXIT
}

# One target with libFuzzer's options and folders or files.
run() {
    local target=$1
    shift
    # One core: conversions have no threads of their own.
    RAYON_NUM_THREADS=1 SLUICE_FUZZ_TARGET=$target "$binary" -rss_limit_mb=1024 -malloc_limit_mb=1024 -timeout=10 \
        -print_final_stats=1 -print_funcs=0 "${OPTIONS[@]}" "$@"
}

# Fuzzes a target; not 0 if it has failed.
fuzz() {
    local target=$1 seconds=$2 corpus=corpus/$1 findings=findings/$1 log=findings/$1.log seeds regressions=()
    mkdir -p "$corpus" "$findings"
    seeds=$(mktemp -d)
    SLUICE_FUZZ_SEEDS=$seeds SLUICE_FUZZ_TARGET=$target "$binary" >"$log" 2>&1 || {
        complain "$target" "$log" "it has no seeds"
        return 1
    }
    if [ -d "regressions/$target" ]; then mapfile -t regressions < <(find "regressions/$target" -type f | sort); fi
    if [ "${#regressions[@]}" -gt 0 ]; then
        run "$target" "${regressions[@]}" >"$log" 2>&1 || {
            complain "$target" "$log" "a fault has come back"
            return 1
        }
    fi
    run "$target" -max_len=131072 -max_total_time="$seconds" -artifact_prefix="$findings/" "$corpus" "$seeds" >"$log" 2>&1 || {
        complain "$target" "$log" "the input is in fuzz/$findings"
        return 1
    }
    printf '%-12s %s s, %s inputs a second, %s edges, %s inputs kept, %s MB\n' "$target" "$seconds" \
        "$(figure "$log" average_exec_per_sec)" "$(grep -o 'cov: [0-9]*' "$log" | tail -n 1 | cut -d' ' -f2)" \
        "$(find "$corpus" -type f | wc -l)" "$(figure "$log" peak_rss_mb)"
}

figure() {
    sed -n "s/^stat::$2: *//p" "$1" | tail -n 1
}

# The end of a log that matters, and what is wrong.
complain() {
    grep -v '^#\|^"' "$2" | tail -n 60 >&2
    printf 'fuzz: %s failed: %s; see fuzz/%s, and replay an input with fuzz/run.sh replay %s FILE\n' "$1" "$3" "$2" "$1" >&2
}

[ "$#" -gt 0 ] || {
    usage
    exit 2
}
case $1 in
-h | --help | help)
    usage
    exit
    ;;
replay)
    [ "$#" -gt 2 ] || fail "say which target and which files"
    build
    scratch
    target=$2
    files=()
    for file in "${@:3}"; do
        case $file in /*) files+=("$file") ;; *) files+=("$CALLED_FROM/$file") ;; esac
    done
    run "$target" "${files[@]}"
    ;;
*[!0-9]*) fail "$1 is no number of seconds; see fuzz/run.sh --help" ;;
*)
    seconds=$1
    shift
    for target in "$@"; do
        [[ " ${TARGETS[*]} " == *" $target "* ]] || fail "there is no target $target; see fuzz/run.sh --help"
    done
    [ "$#" -gt 0 ] || set -- "${TARGETS[@]}"
    build
    scratch
    failed=()
    for target in "$@"; do fuzz "$target" "$seconds" || failed+=("$target"); done
    [ "${#failed[@]}" -eq 0 ] || fail "failed: ${failed[*]}"
    ;;
esac
