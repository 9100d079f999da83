#!/usr/bin/env bash
# Builds everything that is given to people, into target/packages: for each target the program, linked statically on Linux, in a
# tar.gz with manual pages, completions, licence and SBOM; Debian packages; an OCI image; checksums of all.
#
# The same commit and compiler give the same bytes of packages around the same program. What cannot be built here is skipped, and said
# twice. packaging/check.sh tries what came of it.
set -euo pipefail
cd "$(dirname "$0")/.."
readonly NAME=packaging
# shellcheck source=.ci/lib.sh
source .ci/lib.sh

usage() {
    cat <<'EOF'
usage: packaging/build.sh [TARGET...]
           builds for these targets, or for all:
               x86_64-unknown-linux-musl, aarch64-unknown-linux-musl, aarch64-apple-darwin
           SLUICE_COMMIT names the commit where there is no repository
EOF
}

readonly ALL=(x86_64-unknown-linux-musl aarch64-unknown-linux-musl aarch64-apple-darwin)
readonly OUT=$PWD/target/packages

VERSION=$(sed -n 's/^version = "\(.*\)"$/\1/p' Cargo.toml | head -n 1)
SLUICE_COMMIT=${SLUICE_COMMIT:-$(git describe --always --abbrev=12 --dirty --exclude '*' 2>/dev/null || echo unknown)}
# What stands in the place of the time: that of the commit.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 0)}
readonly VERSION
export SLUICE_COMMIT SOURCE_DATE_EPOCH

# What Debian and OCI call the architecture of a target.
architecture() {
    case $1 in
    x86_64-*) echo amd64 ;;
    aarch64-*) echo arm64 ;;
    *) fail "$1: packaging/build.sh does not know this architecture" ;;
    esac
}

binary() {
    echo "target/$1/release/sluice"
}

# Paths of this machine do not belong into a program that is given to others.
flags() {
    local cargo=${CARGO_HOME:-$HOME/.cargo}
    echo "--remap-path-prefix=$PWD=sluice --remap-path-prefix=$cargo=cargo"
}

compile() {
    local target=$1
    # Whoever builds for himself keeps names of lines for a profiler; a package is as small as it can be.
    CARGO_PROFILE_RELEASE_DEBUG=false CARGO_PROFILE_RELEASE_STRIP=debuginfo RUSTFLAGS="$(flags) ${RUSTFLAGS:-}" \
        cargo-zigbuild zigbuild --release --locked -p sluice --bin sluice --target "$target"
}

# Manual pages and completions, which are the same for every target, from a program that runs here.
describe() {
    local program=$1 shell
    rm -rf "$OUT/common"
    mkdir -p "$OUT/common/completions"
    "$program" man "$OUT/common/man"
    while read -r shell file; do
        "$program" completions "$shell" >"$OUT/common/completions/$file"
    done <<'EOF'
bash sluice.bash
elvish sluice.elv
fish sluice.fish
powershell _sluice.ps1
zsh _sluice
EOF
    cp README.md LICENSE CHANGELOG.md "$OUT/common/"
}

# A program that runs on this machine: one that was built for it anyway, or one more.
native() {
    local target
    for target in "$@"; do
        if "$(binary "$target")" -V >/dev/null 2>&1; then
            binary "$target"
            return
        fi
    done
    cargo build --release --locked -p sluice --bin sluice >&2
    echo target/release/sluice
}

# The folder that all packages of a target are made of.
stage() {
    local target=$1 stage=$OUT/stage/$1
    rm -rf "$stage"
    mkdir -p "$stage"
    cp -R "$OUT/common/." "$stage/"
    cp "$(binary "$target")" "$stage/sluice"
    chmod 755 "$stage/sluice"
    cargo metadata --format-version 1 --locked --filter-platform "$target" |
        python3 packaging/sbom.py "$target" "$VERSION" "$SLUICE_COMMIT" "$SOURCE_DATE_EPOCH" "$stage/sluice-$VERSION.cdx.json"
}

pack() {
    local target=$1 stage=$OUT/stage/$1 name=sluice-$VERSION-$1
    stage "$target"
    python3 packaging/tarball.py "$stage" "$name" "$SOURCE_DATE_EPOCH" "$OUT/$name.tar.gz"
    case $target in
    *-linux-*)
        local debian
        debian=$(architecture "$target")
        python3 packaging/deb.py "$stage" "$VERSION" "$debian" "$SOURCE_DATE_EPOCH" "$OUT/sluice_${VERSION}_$debian.deb"
        ;;
    esac
}

image() {
    local target images=()
    for target in "$@"; do
        case $target in
        *-linux-*) images+=("$(architecture "$target")=$(binary "$target")") ;;
        esac
    done
    [ "${#images[@]}" -gt 0 ] || return 0
    python3 packaging/oci.py "$VERSION" "$SLUICE_COMMIT" "$SOURCE_DATE_EPOCH" "$OUT/sluice-$VERSION.oci.tar" "${images[@]}"
}

case ${1:-} in
-h | --help)
    usage
    exit
    ;;
esac
wanted=("$@")
[ "${#wanted[@]}" -gt 0 ] || wanted=("${ALL[@]}")

step "tools"
mkdir -p "$OUT"
rm -f "$OUT"/sluice[-_]* "$OUT/SHA256SUMS"
built=()
for target in "${wanted[@]}"; do
    [[ " ${ALL[*]} " == *" $target "* ]] || fail "$target is none of: ${ALL[*]}"
    if has_target "$target" "the program for $target" && has_zigbuild "the program for $target"; then built+=("$target"); fi
done
[ "${#built[@]}" -gt 0 ] || fail "no target can be built here"

for target in "${built[@]}"; do
    step "$target"
    compile "$target"
done

step "packages"
describe "$(native "${built[@]}")"
for target in "${built[@]}"; do pack "$target"; done
image "${built[@]}"
(cd "$OUT" && sha256sum sluice[-_]* >SHA256SUMS && cat SHA256SUMS)
finish
