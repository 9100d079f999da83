#!/bin/sh
# Cargo's RUSTC_WRAPPER for the fuzzing targets: gives libFuzzer its coverage, in the crates whose paths it shall explore.
# Build scripts and the rest stay plain: they would only cost time, and could not be linked.
rustc=$1
shift
case " $* " in
*" --crate-name sluice_"* | *" --crate-name tokenizers "* | *" --crate-name minijinja "*)
    # What cargo-fuzz passes, without a sanitizer, which would need a nightly compiler.
    exec "$rustc" "$@" -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
        -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
        -Cllvm-args=-sanitizer-coverage-trace-compares
    ;;
esac
exec "$rustc" "$@"
