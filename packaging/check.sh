#!/usr/bin/env bash
# Tries what packaging/build.sh has made: every package for Linux is installed into an empty folder, which then is the root of all that the
# program sees, and the demo runs there. Of the program for macOS, it is checked that it is one.
set -euo pipefail
cd "$(dirname "$0")/.."
readonly NAME=packaging
# shellcheck source=.ci/lib.sh
source .ci/lib.sh

readonly OUT=$PWD/target/packages
ROOTS=$(mktemp -d)
readonly ROOTS
trap 'rm -rf "$ROOTS"' EXIT

# A command with nothing but a folder to see.
within() {
    local root=$1
    shift
    local namespace=()
    [ "$(id -u)" -eq 0 ] || namespace=(unshare --map-root-user)
    mkdir -p "$root/tmp"
    "${namespace[@]}" env -i HOME=/tmp "$(PATH=$PATH:/usr/sbin command -v chroot)" "$root" "$@"
}

# Whether programs of an architecture run here; an emulator cannot be seen from inside a bare root.
runs_here() {
    case $1 in
    amd64 | x86_64-*) [ "$(uname -sm)" = "Linux x86_64" ] ;;
    arm64 | aarch64-*) [ "$(uname -sm)" = "Linux aarch64" ] ;;
    esac
}

try_demo() {
    local root=$1 program=$2 said
    [ "$(find "$root" -name '*.so*' -o -name sh -type f | wc -l)" -eq 0 ] || fail "$root is not bare"
    said=$(within "$root" "$program" demo) || fail "the demo fails in a bare root"
    grep -q "^Check .*the same" <<<"$said" || fail "the demo does not say that its text is the same: $said"
    within "$root" "$program" --version
}

# The program stands for its tarball's name.
check_tarball() {
    local archive=$1 name root=$ROOTS/tarball
    name=$(basename "$archive" .tar.gz)
    mkdir -p "$root"
    tar -xzf "$archive" -C "$root"
    local file
    for file in sluice README.md LICENSE man/sluice.1 man/sluice-run.1 completions/_sluice completions/sluice.bash; do
        [ -s "$root/$name/$file" ] || fail "$archive lacks $file"
    done
    case $name in
    *-apple-darwin)
        # The magic number of a 64-bit Mach-O file, and the processor's.
        [ "$(od -An -tx1 -N8 "$root/$name/sluice" | tr -d ' \n')" = "cffaedfe0c000001" ] || fail "$name is no program for macOS"
        ;;
    *)
        local target=${name#sluice-*-}
        if runs_here "$target"; then
            try_demo "$root" "/$name/sluice"
        else
            skip "the demo of $name: this machine has another processor"
        fi
        ;;
    esac
    rm -rf "$root"
}

check_deb() {
    local package=$1 architecture=${1##*_} root=$ROOTS/deb
    if ! command -v dpkg >/dev/null; then
        skip "$(basename "$package"): dpkg is not installed"
        return
    fi
    architecture=${architecture%.deb}
    mkdir -p "$root/var/lib/dpkg/updates" "$root/var/lib/dpkg/info"
    touch "$root/var/lib/dpkg/status"
    if ! runs_here "$architecture"; then
        dpkg-deb --contents "$package" >/dev/null
        skip "the demo of $(basename "$package"): this machine has another processor"
    else
        dpkg --root="$root" --log="$root/var/log" --force-not-root --force-script-chrootless --install "$package"
        dpkg --root="$root" --verify sluice
        try_demo "$root" /usr/bin/sluice
    fi
    rm -rf "$root"
}

check_image() {
    local archive=$1 architecture root=$ROOTS/image entry
    case $(uname -m) in
    x86_64) architecture=amd64 ;;
    aarch64) architecture=arm64 ;;
    esac
    mkdir -p "$root"
    mapfile -t entry < <(python3 packaging/unpack_oci.py "$archive" "$architecture" "$root")
    [ "${entry[*]}" = "/sluice serve" ] || fail "the entry of the image is ${entry[*]}"
    within "$root" "${entry[@]}" --help | grep -q "Serve models over HTTP" || fail "the image does not serve"
    try_demo "$root" /sluice
    rm -rf "$root"
}

step "checksums"
(cd "$OUT" && sha256sum --check --quiet SHA256SUMS)
for package in "$OUT"/*.tar.gz; do
    step "$(basename "$package")"
    check_tarball "$package"
done
for package in "$OUT"/*.deb; do
    step "$(basename "$package")"
    check_deb "$package"
done
for package in "$OUT"/*.oci.tar; do
    step "$(basename "$package")"
    check_image "$package"
done
finish
