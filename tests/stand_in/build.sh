#!/bin/sh
# Makes the stand-ins for libcuda and libnccl (see stand_in.h) in a folder, for LD_LIBRARY_PATH, and the one for libnvrtc in
# its folder nvrtc, for who wants kernels to run.
set -eu
from=$(cd "$(dirname "$0")" && pwd)
to=$1
# Processes may be using what is there.
last=$to/nvrtc/libnvrtc.so
if [ -e "$last" ] && [ -z "$(find "$from" -newer "$last")" ]; then exit 0; fi
rm -rf "$to"
mkdir -p "$to/nvrtc"
to=$(cd "$to" && pwd)
flags="-O2 -Wall -Wextra -shared -fPIC -pthread"
# One library by two names: NCCL's streams are the driver's. The name libcuda.so.1 is left out, since the real NVRTC looks
# there for more of a driver than this.
mpicc $flags "$from/cuda.c" "$from/nccl.c" "$from/kernels.c" -ldl -o "$to/libcuda.so"
ln -sf libcuda.so "$to/libnccl.so.2"
# With headers of its own: the checkout that built this may be gone when kernels are compiled.
cp -r "$from/include" "$to/include"
mpicc $flags -DINCLUDE="\"$to/include\"" -DLIBRARIES="\"$to\"" "$from/nvrtc.c" -o "$to/nvrtc/libnvrtc.so"
