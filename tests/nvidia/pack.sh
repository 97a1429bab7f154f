#!/bin/sh
# Builds what check.sh runs, and lays it with check.sh into a folder:
#
#   sh tests/nvidia/pack.sh [--with-mpi] FOLDER
#
# `make check-nvidia` does that and runs it on the spot. The folder can also be carried to a machine with a GPU that has
# neither cargo nor a compiler: with --with-mpi (Debian, Ubuntu) neither OpenMPI. CUDA is needed there, not here.
set -eu
fail() { echo "pack.sh: $*" >&2; exit 2; }
mpi=
if [ "${1:-}" = --with-mpi ]; then mpi=yes; shift; fi
case ${1:-} in
    '' | -*) fail "name a folder: sh tests/nvidia/pack.sh [--with-mpi] FOLDER" ;;
    /*) to=$1 ;;
    *) to=$PWD/$1 ;;
esac
# It is made anew.
if [ -e "$to" ] && [ ! -e "$to/check.sh" ]; then
    [ -d "$to" ] && [ -z "$(ls -A "$to")" ] || fail "$to is there and is no earlier pack: name another folder"
fi
root=$(cd "$(dirname "$0")/../.." && pwd)
cd "$root"

# A build of its own, to be run once: without what debuggers want.
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$HOME/.cache/repa-dist/target}/cuda"
sh launcher/setup.sh
export CARGO_PROFILE_RELEASE_DEBUG=0 CARGO_PROFILE_RELEASE_STRIP=symbols CARGO_INCREMENTAL=0
features="--features repa-dist/cuda,repa-tests/cuda,repa-comm/nccl"
packages="-p repa-dist -p repa-tests -p repa-trainer -p repa-comm"
# shellcheck disable=SC2086
cargo build --release --locked -p repa-dist -p repa-tests $features
list=$(mktemp)
trap 'rm -f "$list"' EXIT
# shellcheck disable=SC2086
cargo test --release --locked --no-run $packages $features --lib --test gpu --test golden --test conformance \
    2>"$list" || { cat "$list" >&2; exit 1; }

rm -rf "$to"
mkdir -p "$to/bin"
cp "$CARGO_TARGET_DIR/release/repa-dist" "$to/bin/"
# The lines are like `Executable tests/gpu.rs (/folder/deps/gpu-0123456789abcdef)`.
executable() {
    path=$(sed -n "s|^ *Executable .*(\(.*/deps/$1-[0-9a-f]*\))\$|\1|p" "$list")
    case $path in
        /*) ;;
        *) path=$root/$path ;;
    esac
    cp "$path" "$to/bin/$2"
}
executable gpu gpu
executable golden golden
executable conformance conformance
executable repa_trainer trainer
mkdir "$to/golden" "$to/configs" "$to/comparisons"
cp tests/golden/*.safetensors tests/golden/*.pt "$to/golden/"
cp configs/*.toml "$to/configs/"
cp tests/comparisons/step.py tests/comparisons/data_loading.py "$to/comparisons/"
cp tests/nvidia/check.sh "$to/"

if [ -n "$mpi" ]; then
    # Files under the folder mpi as the packages lay them under /, and beside them the libraries that they need and that
    # a small system may lack.
    for package in openmpi-bin openmpi-common libopenmpi3 libpmix2; do
        dpkg -L "$package" | grep -v '/share/\(doc\|man\|lintian\)' | while read -r path; do
            if [ -f "$path" ]; then
                mkdir -p "$to/mpi$(dirname "$path")"
                cp -P "$path" "$to/mpi$path"
            fi
        done
    done
    # Debian's names are links of its alternatives.
    for program in mpirun orted; do cp -L "$(command -v $program)" "$to/mpi/usr/bin/$program"; done
    mkdir "$to/mpi/lib"
    { ldd "$to/mpi/usr/bin/mpirun" "$to/bin/repa-dist" && find "$to/mpi" -name '*pmix*.so*' -exec ldd {} +; } |
        sed -n 's/.* => \(\/[^ ]*\) .*/\1/p' | sort -u |
        grep -v '/lib\(c\|m\|dl\|rt\|pthread\|gcc_s\|stdc++\)\.so' | xargs -I LIBRARY cp -L LIBRARY "$to/mpi/lib/"
fi
du -sh "$to"
