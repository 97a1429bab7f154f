# Four doors: run, test, bench, lint. Build outputs live outside the checkout, so that a fresh clone
# builds fast.
export CARGO_TARGET_DIR ?= $(HOME)/.cache/repa-dist/target
export PATH := $(HOME)/.cargo/bin:$(PATH)
# OpenMPI refuses root unless told twice.
ifeq ($(shell id -u),0)
export OMPI_ALLOW_RUN_AS_ROOT = 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM = 1
endif

REPA = $(CARGO_TARGET_DIR)/release/repa-dist
CARGO = cargo
RANKS ?= 2
# More ranks than cores is slow but works; OpenMPI wants to be told, and counts no second thread of a core.
MPIRUN = mpirun --oversubscribe -n $(RANKS)

.PHONY: help setup build run test soak bench bench-pytorch lint check-cuda check-gpu check-nvidia dashboards-check

help:
	@echo "make run    set up, build, make the quickstart data, train it on $(RANKS) MPI ranks, sample"
	@echo "make test   set up, build and run all tests"
	@echo "make bench  measure, and print what BENCHMARKS.md quotes"
	@echo "make lint   rustfmt and clippy"

setup:
	@sh launcher/setup.sh

build: setup
	@echo "building into $(CARGO_TARGET_DIR) (some 10 minutes the first time on 2 cores)"
	@$(CARGO) build --release --locked -p repa-dist

run: build
	@$(REPA) data quickstart
	@$(MPIRUN) $(REPA)
	@$(REPA) sample
	@$(REPA) evaluate
	@$(REPA) report

test:
	@sh launcher/setup.sh test
	$(CARGO) build --release --locked -p repa-dist
	$(CARGO) nextest run --release --locked --workspace --exclude repa-comm
	$(CARGO) nextest run --release --locked -p repa-comm --features nccl

# 200 killed ranks instead of 20: some ten minutes.
soak: build
	REPA_KILLS=200 $(CARGO) nextest run --release --locked -p repa-tests --test checkpoints -E 'test(killed)'

bench: build
	$(MPIRUN) $(REPA) bench all-reduce
	$(MPIRUN) $(REPA) bench telemetry
	$(REPA) bench data
	$(REPA) bench start
	$(REPA) bench import
	$(MPIRUN) $(REPA) bench checkpoint --steps 3 model.hidden_size=960 model.num_heads=12

# Installs PyTorch (5 GB) into an environment of its own.
bench-pytorch: build
	python3 tests/comparisons/data_loading.py --binary $(REPA)
	python3 tests/comparisons/all_reduce.py --binary $(REPA)
	python3 tests/comparisons/checkpoints.py --binary $(REPA)
	python3 tests/comparisons/weak_scaling.py --binary $(REPA)

# Draws the dashboards with Grafana's own components; installs some 500 MB of npm packages.
dashboards-check: build
	REPA=$(REPA) sh dashboards/check/check.sh

check-cuda: setup
	$(CARGO) clippy --release --locked -p repa-dist --features cuda -- -D warnings

# The GPU's code where there is no GPU: another build (20 minutes the first time on 2 cores), in which the golden cases and
# small runs take whatever Vulkan finds, and CUDA, for whose libraries tests/stand_in stands in.
GPU_FEATURES = repa-dist/wgpu,repa-tests/wgpu,repa-dist/cuda-untuned,repa-tests/cuda
GPU_TESTS = -p repa-dist -p repa-tests -p repa-trainer --features $(GPU_FEATURES)
check-gpu: export CARGO_TARGET_DIR := $(CARGO_TARGET_DIR)/wgpu
# Built to be run once: a third of the size.
check-gpu: export CARGO_PROFILE_RELEASE_DEBUG = 0
check-gpu: export CARGO_INCREMENTAL = 0
check-gpu:
	@sh launcher/setup.sh gpu
	$(CARGO) build --release --locked $(GPU_TESTS)
	REPA_TEST_DEVICE=wgpu $(CARGO) nextest run --release --locked $(GPU_TESTS) --lib --test gpu --test golden \
		-E 'binary(gpu) + binary(golden) + test(/^ops::/) + test(sit::tests::watched) + test(kernels::) + test(telemetry::host)'
	REPA_TEST_DEVICE=cuda:0 REPA_TEST_GPU=stand-in $(CARGO) nextest run --release --locked $(GPU_TESTS) --test golden

# The same on an NVIDIA GPU, and how long its steps take (a build of its own). pack.sh says how to carry it to a machine
# that cannot build.
check-nvidia:
	sh tests/nvidia/pack.sh $(CARGO_TARGET_DIR)/nvidia
	bash $(CARGO_TARGET_DIR)/nvidia/check.sh $(CARGO_TARGET_DIR)/nvidia-results

lint: setup
	$(CARGO) fmt --check
	$(CARGO) clippy --release --locked --workspace --all-targets -- -D warnings
