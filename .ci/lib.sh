# shellcheck shell=bash
# What .ci/run and .ci/long share. NAME is how their messages begin.

# Nothing here is compiled twice after a small change, which is what the bookkeeping of incremental compilation is for.
export CARGO_INCREMENTAL=0
# Nobody looks at these programs in a debugger, and a message of a panic has its line without.
export CARGO_PROFILE_DEV_DEBUG=false

# Checks for which something could not be had.
skipped=()
# Names and seconds of the steps that are done.
durations=()
step_name=
step_began=0

# Begins a step, which ends when the next one begins.
step() {
    end_step
    step_name=$*
    step_began=$SECONDS
    printf '\n== %s\n' "$*"
}

end_step() {
    [ -z "$step_name" ] || durations+=("$(printf '%5d s  %s' "$((SECONDS - step_began))" "$step_name")")
    step_name=
}

fail() {
    printf '%s: failed: %s\n' "$NAME" "$*" >&2
    exit 1
}

# A check that cannot be made here is no failure, but nobody may overlook it.
skip() {
    skipped+=("$*")
    printf '%s: skipped: %s\n' "$NAME" "$*" >&2
}

# What took how long, what was skipped, and the verdict.
finish() {
    end_step
    printf '\n'
    printf '%s\n' "${durations[@]}"
    if [ "${#skipped[@]}" -eq 0 ]; then
        printf '\n%s: all checks passed\n' "$NAME"
        return
    fi
    printf '\n' >&2
    local what
    for what in "${skipped[@]}"; do printf '%s: skipped: %s\n' "$NAME" "$what" >&2; done
    printf '\n%s: all checks passed, except for those skipped (%s)\n' "$NAME" "${#skipped[@]}"
}

# Installs Debian packages, where there are such.
install_packages() {
    command -v apt-get >/dev/null || return 1
    local sudo=()
    [ "$(id -u)" -eq 0 ] || sudo=(sudo)
    "${sudo[@]}" apt-get update -q &&
        "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "$@"
}

# A part of the toolchain, such as clippy, for `cargo $1`.
has_component() {
    cargo "$1" --version >/dev/null 2>&1 && return
    command -v rustup >/dev/null && timeout 60 rustup component add "$2" >/dev/null 2>&1 && return
    skip "cargo $1: $2 is not installed and cannot be had here"
    return 1
}

# The standard library for another target. $2 says what is skipped without it.
has_target() {
    [ -d "$(rustc --print target-libdir --target "$1")" ] && return
    command -v rustup >/dev/null && timeout 300 rustup target add "$1" >/dev/null 2>&1 && return
    skip "$2: the standard library for $1 is not installed and cannot be had here"
    return 1
}

# Tools that are built or unpacked for these scripts alone.
readonly TOOLS=$PWD/target/tools
PATH=$TOOLS/bin:$TOOLS/python/bin:$PATH

# cargo-deny, built from its source without optimisation: that takes a minute, and it runs for seconds.
has_deny() {
    cargo deny --version >/dev/null 2>&1 && return
    cargo install cargo-deny --version 0.20.2 --locked --debug --quiet --root "$TOOLS" && return
    skip "cargo deny: cargo-deny is not installed and cannot be had here"
    return 1
}

# cargo-zigbuild and the C compiler and linker for all targets that it calls.
has_zigbuild() {
    command -v cargo-zigbuild >/dev/null && return
    make_python && "$TOOLS/python/bin/pip" install --quiet --disable-pip-version-check cargo-zigbuild==0.24.1 ziglang==0.17.1 &&
        return
    skip "$1: cargo-zigbuild is not installed and cannot be had here"
    return 1
}

# Looks at the code that is there for another target. Tests are not looked at: none of them is written for a target alone.
check_for() {
    has_target "$1" "clippy for $1" && has_zigbuild "clippy for $1" || return 0
    if has_component clippy clippy; then CARGO_PROFILE_DEV_OPT_LEVEL=0 cargo-zigbuild clippy --workspace --lib --bins --target "$1" -- -D warnings; fi
}

# Links the program without a machine of that kind. Nothing is optimised, since nothing is run.
link_for() {
    has_target "$1" "a link for $1" && has_zigbuild "a link for $1" || return 0
    CARGO_PROFILE_DEV_OPT_LEVEL=0 cargo-zigbuild zigbuild -p sluice --target "$1"
}

# A virtual environment of Python's.
make_python() {
    python3 -m venv "$TOOLS/python" && return
    install_packages python3 python3-venv && python3 -m venv --clear "$TOOLS/python"
}

# An emulator for aarch64 and a C compiler and library for it; tells cargo of them.
has_emulator() {
    if ! command -v qemu-aarch64 >/dev/null || ! command -v aarch64-linux-gnu-gcc >/dev/null; then
        install_packages qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross || {
            skip "$1: qemu-aarch64 and aarch64-linux-gnu-gcc are not installed and cannot be had here"
            return 1
        }
    fi
    export CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER=qemu-aarch64
    export QEMU_LD_PREFIX=/usr/aarch64-linux-gnu
}

# The tests of kernels and checksums on an emulated processor: `max` has everything, `cortex-a72` no dot product. What follows the
# processor goes to the tests.
test_kernels_on() {
    QEMU_CPU=$1 cargo test -p sluice-checksum -p sluice-kernels --target aarch64-unknown-linux-gnu -- "${@:2}"
}

# What the server is tried with: program, scripted server, and models that chat. All of the workspace is named, since a choice
# of packages has other features, with which everything would be compiled once more.
readonly SERVED=$PWD/target/clients
build_server() {
    cargo build --workspace --bins --example chat-model --example scripted-server
    mkdir -p "$SERVED"
    target/debug/examples/chat-model "$SERVED/chat-model.sluice" full "$SERVED/checkpoint"
    target/debug/examples/chat-model "$SERVED/chat-states.sluice" states
}

# Many clients at once for $1 seconds, while the server is killed $2 times.
soak_server() {
    if ! command -v python3 >/dev/null && ! install_packages python3; then
        skip "soak of the server: Python is not installed and cannot be had here"
        return
    fi
    python3 tests/server/soak.py --program target/debug/sluice --model "$SERVED/chat-model.sluice" --seconds "$1" --kills "$2"
}
