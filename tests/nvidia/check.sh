#!/bin/bash
# What only an NVIDIA GPU can tell, from the folder that pack.sh has made: NCCL and the golden cases on the GPU, losses
# against the CPU's, and how long a step takes. Parts go in the order in which they are wanted, each with a time limit, and
# a part that fails stops no other.
#
#   check.sh [--seconds TOTAL] [OUT] [PART...]
#
# Writes a log for each part and summary.txt to OUT (by default ./nvidia). Exit code 1 where a part failed.
set -u
here=$(cd "$(dirname "$0")" && pwd)
fail() { echo "check.sh: $*" >&2; exit 2; }
total=3600
if [ "${1:-}" = --seconds ]; then
    [[ "${2:-}" =~ ^[0-9]+$ ]] || fail "--seconds takes a number, not '${2:-}'"
    total=$2
    shift 2
fi
case ${1:-} in
    -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 0 ;;
    -*) fail "there is no option '$1': check.sh --help" ;;
esac
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')
[ "$gpus" -gt 0 ] || fail "nvidia-smi shows no NVIDIA GPU here"
parts=$(sed -n 's/^\(if .*then \)\{0,1\}\(part\|step\|beside_pytorch\) \([a-z0-9-]*\) .*/\3/p' "$0" | tr '\n' ' ')
for part in "${@:2}"; do
    case " $parts" in *" $part "*) ;; *) fail "there is no part '$part': $parts" ;; esac
done
out=${1:-nvidia}
[ $# -eq 0 ] || shift
wanted=" $* "
mkdir -p "$out"
out=$(cd "$out" && pwd)
: >"$out/summary.txt"
started=$SECONDS
failed=0

if [ -d "$here/mpi" ]; then
    export OPAL_PREFIX="$here/mpi/usr" PMIX_INSTALL_PREFIX="$here/mpi/usr" PATH="$here/mpi/usr/bin:$PATH"
    export LD_LIBRARY_PATH="$here/mpi/lib:$here/mpi/usr/lib/x86_64-linux-gnu${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
    # Plugins for networks whose libraries are not along.
    export OMPI_MCA_mca_base_component_show_load_errors=0
fi
if [ "$(id -u)" = 0 ]; then export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; fi
for folder in /usr/local/cuda/lib64 /usr/local/nvidia/lib64 /usr/local/nvidia/lib; do
    if [ -d "$folder" ]; then export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folder"; fi
done
# PyTorch's NCCL, where the system has none.
if [ -z "${REPA_NCCL_LIBRARY:-}" ] && ! ldconfig -p 2>/dev/null | grep -q libnccl.so; then
    found=$(python3 -c 'import glob, nvidia.nccl as n; print(glob.glob(list(n.__path__)[0] + "/lib/libnccl.so*")[0])' 2>/dev/null)
    if [ -n "$found" ]; then export REPA_NCCL_LIBRARY="$found"; fi
fi
export REPA_TEST_GPU=nvidia REPA_TEST_DEVICE=cuda:0 REPA_GOLDEN_DIR="$here/golden"
# Two ranks on one GPU.
if [ "$gpus" -lt 2 ]; then export NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_NVLS_ENABLE=0 NCCL_MAX_CTAS=4; fi
repa=$here/bin/repa-dist
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 2

say() { echo "$*" | tee -a "$out/summary.txt"; }

# part NAME SECONDS COMMAND...: runs it, with what it says in NAME.log, and its peak of the GPU's memory.
part() {
    local name=$1 limit=$2 left=$((total - (SECONDS - started))) before=$SECONDS code peak
    shift 2
    if [ "$wanted" != "  " ] && [[ "$wanted" != *" $name "* ]]; then return; fi
    if [ "$left" -lt 10 ]; then say "$name: no time left"; failed=1; return; fi
    if [ "$limit" -gt "$left" ]; then limit=$left; fi
    (while :; do nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits; sleep 0.5; done) \
        >"$out/.memory" 2>/dev/null &
    local watch=$!
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
    code=$?
    { kill "$watch" && wait "$watch"; } 2>/dev/null
    peak=$(sort -n "$out/.memory" | tail -1)
    rm -f "$out/.memory"
    say "$name: exit code $code after $((SECONDS - before)) s, at most ${peak:-?} MiB of the GPU's memory in use"
    if [ "$code" != 0 ]; then failed=1; tail -n 15 "$out/$name.log" | sed 's/^/    /' | tee -a "$out/summary.txt"; fi
    grep '^skipped' "$out/$name.log" | tee -a "$out/summary.txt"
    if [ "${name#step}" != "$name" ]; then tail -n 20 "$out/$name.log" | tee -a "$out/summary.txt"; fi
}

# Whether NCCL, as doctor has seen it, can have two ranks on one GPU: from 2.30 on.
shares_gpus() {
    local major minor
    [ -s "$out/doctor.log" ] || "$repa" doctor --quick device=cuda:0 >"$out/doctor.log" 2>&1
    read -r major minor < <(sed -n 's/^ok  *NCCL  *\([0-9]*\)\.\([0-9]*\)\..*/\1 \2/p' "$out/doctor.log" 2>/dev/null)
    [ "$((1000 * ${major:-0} + ${minor:-0}))" -ge 2030 ]
}

# A step of a paper's model on random data.
step() {
    local name=$1 ranks=$2 config=$3 batch=$4 precision=$5 device=cuda:0
    shift 5
    if [ "$wanted" != "  " ] && [[ "$wanted" != *" $name "* ]]; then return; fi
    if [ "$ranks" -le "$gpus" ]; then
        device=cuda
    elif ! shares_gpus; then
        say "$name: this NCCL has no two ranks on one GPU; gradients go over MPI"
        set -- comm.backend=mpi "$@"
    fi
    part "$name" 200 mpirun --oversubscribe --bind-to none -n "$ranks" "$repa" bench step --json --steps 20 \
        --config "$here/configs/$config.toml" device="$device" train.global_batch="$batch" train.precision="$precision" "$@"
}

# The same on one rank, beside PyTorch's where python3 has it.
beside_pytorch() {
    local name=$1 config=$2 batch=$3 precision=$4
    shift 4
    if python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
        part "$name" 200 python3 "$here/comparisons/step.py" --binary "$repa" --configs "$here/configs" \
            --config "$config" --batch "$batch" --precision "$precision" "$@"
    else
        step "$name" 1 "$config" "$batch" "$precision"
    fi
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>&1 | tee -a "$out/summary.txt"
part doctor 60 "$repa" doctor --quick device=cuda:0
part nccl 200 "$here/bin/conformance" nccl::gpu
part learns 200 "$here/bin/gpu" --nocapture --test-threads=1 cuda_learns
part golden 200 "$here/bin/golden"
beside_pytorch step-s2-bf16 sit-s2-repa 64 bf16
beside_pytorch step-xl2-bf16 sit-xl2-repa 32 bf16
part half 120 "$here/bin/gpu" --nocapture cuda_in_half_precision
part quickstart 300 "$here/bin/gpu" --nocapture the_quickstart
if [ -x "$here/bin/trainer" ]; then part operations 100 "$here/bin/trainer" ops::tests sit::tests::watched; fi
beside_pytorch step-s2-f32 sit-s2-repa 64 f32
beside_pytorch step-xl2-bf16-compiled sit-xl2-repa 32 bf16 --compile
step step-s2-two-ranks 2 sit-s2-repa 64 bf16
step step-s2-two-ranks-zero1 2 sit-s2-repa 64 bf16 optimizer.sharding=zero1
part all-reduce 60 mpirun --oversubscribe --bind-to none -n "$gpus" "$repa" bench all-reduce --backend nccl --max-mib 128 --json
say "in all: $((SECONDS - started)) s"
exit "$failed"
