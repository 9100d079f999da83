#!/usr/bin/env bash
# Compares `sluice bench disk` with fio at one block size and depth: random direct reads of the same file with io_uring,
# in turns, and the ratio of the medians. Needs a release build of sluice, and fio (installed with apt-get if missing).
#
# Each runs twice: with pages of 4 KiB, as fio usually does, and with huge pages, as sluice does. On drives to which every
# page is a piece of work of its own, that makes more difference than all else. fio gets huge pages that were reserved
# (/proc/sys/vm/nr_hugepages, 64 suffice), or, where there are none, as many transparent ones as glibc's malloc gives it.
# Sluice reads into as little memory as fio does here (--reuse-memory).
#
#   tests/bench/disk_vs_fio.sh [PATH]      PATH: a large file, or a folder for a scratch file (default: .)
#
# BLOCK (1MiB), DEPTH (16), ROUNDS (7), SECONDS_EACH (2), ENGINE (uring) and SLUICE (target/release/sluice) come from the
# environment.
set -euo pipefail
export LC_ALL=C

readonly BLOCK=${BLOCK:-1MiB} DEPTH=${DEPTH:-16} ROUNDS=${ROUNDS:-7} SECONDS_EACH=${SECONDS_EACH:-2} ENGINE=${ENGINE:-uring}
root=$(cd "$(dirname "$0")/../.." && pwd)
readonly SLUICE=${SLUICE:-${CARGO_TARGET_DIR:-$root/target}/release/sluice}
target=${1:-.}

fail() {
    printf 'disk_vs_fio: %s\n' "$*" >&2
    exit 1
}

install_fio() {
    command -v fio >/dev/null && return
    command -v apt-get >/dev/null || fail "install fio"
    local sudo=()
    [ "$(id -u)" -eq 0 ] || sudo=(sudo)
    "${sudo[@]}" apt-get update -q >/dev/null && "${sudo[@]}" apt-get install -qy fio >/dev/null
}

# 2 GiB that no drive can compress, on the drive and not in the page cache.
make_scratch() {
    file=$(mktemp -p "$1" .sluice-fio-XXXXXX)
    trap 'rm -f -- "$file"' EXIT
    dd if=/dev/urandom of="$file" bs=4M count=512 conv=fsync status=none
    dd if="$file" iflag=nocache count=0 status=none
}

# Megabytes per second by fio: field 7 of its terse output is KiB/s. Its own random map is turned off: neither program
# remembers which blocks it has read.
by_fio() {
    fio --name=compare --filename="$file" --readonly --rw=randread --bs="${BLOCK%iB}" --iodepth="$DEPTH" --ioengine=io_uring \
        --direct=1 --norandommap --randrepeat=0 --time_based --runtime="$SECONDS_EACH" --minimal "$@" |
        awk -F';' '{ printf "%.0f\n", $7 * 1024 / 1e6 }'
}

by_fio_huge() {
    if [ "$(cat /proc/sys/vm/nr_hugepages)" -ge 64 ]; then
        by_fio --iomem=mmaphuge --hugepage-size=2m
    else
        GLIBC_TUNABLES=glibc.malloc.hugetlb=1 by_fio
    fi
}

# Megabytes per second by sluice: all bytes over all time, as fio counts.
by_sluice_huge() {
    "$@" "$SLUICE" bench disk "$file" --engine "$ENGINE" --pattern random --block "$BLOCK" --depth "$DEPTH" \
        --seconds "$SECONDS_EACH" --reuse-memory --no-save --json |
        awk -F'[:,]' '/"mean_bytes_per_second"/ { printf "%.0f\n", $2 / 1e6; exit }'
}

# Without huge pages (41 is PR_SET_THP_DISABLE).
by_sluice() {
    by_sluice_huge python3 -c \
        'import ctypes, os, sys; assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0; os.execv(sys.argv[1], sys.argv[1:])'
}

median() {
    sort -n | awk '{ v[NR] = $1 } END { print (NR % 2) ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2 }'
}

install_fio
[ -x "$SLUICE" ] || fail "no $SLUICE: cargo build --release -p sluice"
file=$target
[ -d "$target" ] && make_scratch "$target"
[ -f "$file" ] || fail "$file is no file and no folder"

printf '%s blocks, %s in flight, random, direct, %s s each, %s; load %s\n' \
    "$BLOCK" "$DEPTH" "$SECONDS_EACH" "$ENGINE" "$(cut -d' ' -f1-3 /proc/loadavg)"
programs=(by_fio by_sluice by_fio_huge by_sluice_huge)
declare -A all
for ((round = 0; round < ROUNDS; round++)); do
    # Who is first changes from round to round.
    for ((i = 0; i < 4; i++)); do
        at=$(((round + i) % 4))
        rate[at]=$("${programs[at]}")
        [ "${rate[at]:-0}" -gt 0 ] || fail "${programs[at]} gave no figure"
        all[${programs[at]}]+="${rate[at]} "
    done
    printf 'round %2d   4 KiB pages: fio %5d, sluice %5d   huge pages: fio %5d, sluice %5d MB/s\n' $((round + 1)) "${rate[@]}"
done
median_of() {
    tr ' ' '\n' <<<"${all[$1]}" | grep . | median
}
for pages in "4 KiB" huge; do
    suffix=
    if [ "$pages" = huge ]; then suffix=_huge; fi
    fio=$(median_of "by_fio$suffix") sluice=$(median_of "by_sluice$suffix")
    printf '%-5s pages: medians fio %6.0f, sluice %6.0f MB/s; sluice / fio %s\n' "$pages" "$fio" "$sluice" \
        "$(awk "BEGIN { printf \"%.3f\", $sluice / $fio }")"
done
