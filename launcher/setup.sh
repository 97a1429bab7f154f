#!/bin/sh
# Installs what building and running repa-dist needs on Debian or Ubuntu: OpenMPI, libclang (for the
# MPI bindings), a C compiler, and Rust by rustup where cargo is missing. Does nothing where all is
# there. `setup.sh test` adds cargo-nextest, which runs the tests, and as root SLURM, for tests of it; `setup.sh gpu`
# adds cargo-nextest, g++ and Vulkan, with Mesa's driver that plays a GPU on the CPU.
set -eu

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 2; }

packages=
need() { packages="$packages $1"; }

command -v mpirun >/dev/null 2>&1 || need openmpi-bin
command -v mpicc >/dev/null 2>&1 || need libopenmpi-dev
command -v cc >/dev/null 2>&1 || need gcc
if ! command -v cc >/dev/null 2>&1 || ! echo '#include <stdlib.h>' | cc -E - >/dev/null 2>&1; then need libc6-dev; fi
# libclang itself and its headers: libclang-cpp, which other tools bring along, has neither.
if ! ls /usr/lib/llvm-*/lib/libclang.so* /usr/lib/llvm-*/lib/libclang-[0-9]*.so* 2>/dev/null | grep -q . ||
    ! ls /usr/lib/llvm-*/lib/clang/*/include/stddef.h /usr/lib/clang/*/include/stddef.h 2>/dev/null | grep -q .; then
    need libclang-dev
fi
command -v pkg-config >/dev/null 2>&1 || need pkg-config
# Several hosts in network namespaces.
if [ "${1:-}" = test ] && ! command -v tc >/dev/null 2>&1; then need iproute2; fi
if [ "${1:-}" = test ] && ! command -v promtool >/dev/null 2>&1; then need prometheus; fi
if [ "${1:-}" = test ] && ! command -v prometheus-pushgateway >/dev/null 2>&1; then need prometheus-pushgateway; fi
if [ "${1:-}" = gpu ]; then
    ldconfig -p 2>/dev/null | grep -q 'libvulkan\.so\.1' || need libvulkan1
    ls /usr/share/vulkan/icd.d/*.json >/dev/null 2>&1 || need mesa-vulkan-drivers
    # Kernels for the stand-in of tests/stand_in.
    command -v g++ >/dev/null 2>&1 || need g++
fi

if [ -n "$packages" ]; then
    command -v apt-get >/dev/null 2>&1 ||
        fail "missing:$packages; this script installs them on Debian and Ubuntu only, so install their like by hand"
    root=
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null 2>&1 || fail "missing:$packages; run as root, or install sudo"
        root=sudo
    fi
    say "installing$packages"
    $root apt-get update -q >/dev/null
    # Nothing that is installed here is started: where there is no policy-rc.d, one that says so stands in.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e $policy ]; then
        printf '#!/bin/sh\nexit 101\n' | $root tee $policy >/dev/null
        $root chmod +x $policy
        trap '$root rm -f $policy' EXIT
    fi
    $root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $packages >/dev/null ||
        fail "apt-get could not install$packages"
fi

# Tests bring a SLURM of their own up, which takes root; without it they are skipped. Its packages would start daemons:
# policy-rc.d is how Debian is told not to.
slurm="slurmctld slurmd slurm-client munge slurm-wlm-basic-plugins"
policy=/usr/sbin/policy-rc.d
slurm_for_tests() {
    if [ ! -e "$policy" ]; then
        trap 'rm -f "$policy"' EXIT
        printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod 755 "$policy" || return 1
    elif "$policy" munge start >/dev/null 2>&1 || [ $? -ne 101 ]; then
        say "$policy would let services start"
        return 1
    fi
    say "installing $slurm"
    # The index may be old, or not there yet.
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $slurm >/dev/null 2>&1 ||
        { apt-get update -q >/dev/null && DEBIAN_FRONTEND=noninteractive \
            apt-get install -y -q --no-install-recommends $slurm >/dev/null; }
}
if [ "${1:-}" = test ] && [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null 2>&1; then
    if ! command -v slurmctld >/dev/null 2>&1 || ! command -v slurmd >/dev/null 2>&1 ||
        ! command -v sbatch >/dev/null 2>&1 || ! command -v munged >/dev/null 2>&1; then
        (slurm_for_tests) || say "SLURM could not be installed: its tests will be skipped"
    fi
fi

if ! command -v cargo >/dev/null 2>&1 && [ ! -x "$HOME/.cargo/bin/cargo" ]; then
    command -v curl >/dev/null 2>&1 || fail "cargo is missing, and curl to fetch it with: install curl, or Rust"
    say "installing Rust by rustup"
    curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y --profile minimal >/dev/null ||
        fail "rustup did not install; see its messages above"
fi
PATH="$HOME/.cargo/bin:$PATH"
if [ -n "${1:-}" ] && ! cargo nextest --version >/dev/null 2>&1; then
    say "installing cargo-nextest"
    cargo install --locked -q cargo-nextest || fail "cargo install cargo-nextest failed"
fi

# Checkouts may share a target directory, and cargo tells by times alone what has changed: files of one that are older than
# the last build, which was another's, would pass for built.
if [ -n "${CARGO_TARGET_DIR:-}" ]; then
    checkout=$(cd "$(dirname "$0")/.." && pwd -P)
    last=$(cat "$CARGO_TARGET_DIR/checkout" 2>/dev/null || true)
    if [ -d "$CARGO_TARGET_DIR/release" ] && [ "$last" != "$checkout" ]; then
        say "$CARGO_TARGET_DIR was last used by ${last:-an unknown checkout}: building repa-dist's own crates anew"
        cargo clean -q --release --manifest-path "$checkout/Cargo.toml" \
            -p repa-comm -p repa-trainer -p repa-dist -p repa-tests ||
            fail "cargo clean failed; remove $CARGO_TARGET_DIR, or set CARGO_TARGET_DIR to a folder of this checkout's own"
    fi
    mkdir -p "$CARGO_TARGET_DIR"
    printf '%s\n' "$checkout" >"$CARGO_TARGET_DIR/checkout"
fi
