# `make demo` and `make test` are the two commands of the README: each starts from a fresh clone and installs what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/siclip-lite0-emoji
OLDEST := .venv-oldest
DIST ?= dist
EXTRAS ?= dev

# One process uses all cores. PASSIVE: the spinning threads of two processes at once would slow both several times.
CORES := $(shell nproc 2>/dev/null || echo 2)
export OMP_NUM_THREADS ?= $(CORES)
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help check-tools install demo ablation finetune test test-quick test-cpu prove sanitize test-gpu bench \
	bench-gpu aot oldest dist wheel wheel-test api lint lint-source clean

help:  ## this list; it fits a screen of 24 lines of 80 columns
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 13

# Prints a line for each missing tool that pip cannot install, with its package in Debian (and Ubuntu) and in Fedora.
PYTHON_PACKAGE := $(or $(filter python3%,$(notdir $(PYTHON))),python3)
define CHECK_TOOLS
missing() { echo "missing: $$1; apt install $$2 (Debian, Ubuntu) or dnf install $$3 (Fedora)" >&2; failed=1; }
python() { $(PYTHON) -c "$$1" >/dev/null 2>&1; }
if ! command -v $(PYTHON) >/dev/null; then
    missing "Python 3.11 or later, called $(PYTHON)" $(PYTHON_PACKAGE) $(PYTHON_PACKAGE)
elif ! python "import sys; assert sys.version_info >= (3, 11)"; then
    missing "Python 3.11 or later; $(PYTHON) is older, make PYTHON=python3.12 takes another" python3.12 python3.12
else
    python "import venv, ensurepip" || missing "the modules venv and ensurepip of $(PYTHON)" $(PYTHON_PACKAGE)-venv $(PYTHON_PACKAGE)
    python "import os, sysconfig as s; os.stat(os.path.join(s.get_path('include'), 'Python.h'))" ||
        missing "the C headers of $(PYTHON) (Python.h)" $(PYTHON_PACKAGE)-dev $(PYTHON_PACKAGE)-devel
fi
compiler=$${CXX:-g++}
command -v $${compiler%% *} >/dev/null || missing "a C++ compiler, called $$compiler" g++ gcc-c++
exit $${failed:-0}
endef
export CHECK_TOOLS

check-tools:  ## what an installation needs and this machine does not have
	@sh -c "$$CHECK_TOOLS"

# What an installation depends on, by content: copies and archives bring old times.
SOURCES := pyproject.toml setup.py requirements.txt simplclip/ops/extension.py \
	$(wildcard simplclip/calls/*.py csrc/*.* csrc/*/*.* csrc/*/*/*.*)
INSTALLED := $(VENV)/.installed-$(firstword $(shell cat $(SOURCES) | cksum))

# NVCC=pypi: the CUDA compiler comes from PyPI, in the version of torch's CUDA, into the same venv. Each part is named, since
# nvcc itself takes any version of the others, and its assembler refuses the PTX of a later nvvm.
define ADD_NVCC
$(if $(filter pypi,$(NVCC)),$1/python -m pip install --quiet \
	$(foreach part,cuda-nvcc cuda-crt nvvm,"nvidia-$(part)==$$($1/python -c 'import torch; print(torch.version.cuda)').*"))
endef

# --no-build-isolation: the extensions are built against the torch that they will run with, and torch is not fetched twice.
$(INSTALLED):
	@sh -c "$$CHECK_TOOLS"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools ninja
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(call ADD_NVCC,$(BIN))
	@echo "$(BIN)/python -m pip install --no-build-isolation -e '.[$(EXTRAS)]', log in $(VENV)/install.log"
	@$(BIN)/python -m pip install --verbose --no-build-isolation -e '.[$(EXTRAS)]' >$(VENV)/install.log 2>&1 || \
		{ tail -n 60 $(VENV)/install.log >&2; exit 1; }
	@rm -f $(VENV)/.installed* && touch $@
	@sed -n 's/^ *\(simplclip: .*\)/\1/p' $(VENV)/install.log | uniq

install: $(INSTALLED)  ## a venv with torch, the compiled kernels and all extras

# By default glibc returns large tensors' memory to the system at once. Getting it back by pages slows a step on a CPU.
demo ablation finetune: export MALLOC_MMAP_THRESHOLD_ ?= 268435456
demo ablation finetune: export MALLOC_TRIM_THRESHOLD_ ?= 1073741824

# What is finished is kept, so that a second call goes on.
EMOJI := examples/emoji

demo: data/emoji-teacher  ## distil a small SiCLIP on emoji and their names, and evaluate it
	$(BIN)/simplclip train $(EMOJI)/siclip-lite0.yaml --resume --set run.out=$(OUT)
	$(BIN)/simplclip evaluate $(OUT)
	@echo
	@echo "Pictures: $(OUT)/curves.png and $(OUT)/evaluation-*.png"
	@echo "Next:     $(BIN)/simplclip train --help-config      every setting, with its default"
	@echo "          $(BIN)/simplclip train $(EMOJI)/siclip-lite0.yaml --set run.steps=2000 --set run.out=runs/longer"
	@echo "          $(BIN)/simplclip export $(OUT) --out export    for open_clip"
	@echo "          $(BIN)/simplclip doctor                   which kernels run here, and why not others"
	@echo "          $(EMOJI)/, docs/your-photos.md            the same with your own pictures"

.PHONY: data/emoji-teacher
data/emoji-teacher: install
	$(BIN)/python $(EMOJI)/build.py --out data/emoji
	$(BIN)/simplclip train $(EMOJI)/teacher.yaml --resume
	$(BIN)/simplclip teacher 'data/emoji/train-*.tar' --teacher runs/emoji-teacher --out data/emoji-teacher

.PHONY: data/emoji-noisy
data/emoji-noisy: data/emoji-teacher
	$(BIN)/python $(EMOJI)/build.py --swap 0.3 --out data/emoji-swap30
	$(BIN)/simplclip teacher 'data/emoji-swap30/train-*.tar' --teacher runs/emoji-teacher --out data/emoji-swap30-teacher

ablation: data/emoji-noisy  ## what each part of the system adds: hours of training; resumes
	$(BIN)/python -m benchmarks.study benchmarks/ablation.yaml --out runs/ablation

finetune: install  ## what ways to fine-tune learn and forget: half an hour; resumes
	$(BIN)/python $(EMOJI)/domains.py --out data/emoji-domains
	$(BIN)/python -m benchmarks.study benchmarks/finetune.yaml --out runs/finetune

# A worker with one thread for each core. The tests of a file stay together, since they share slow fixtures.
XDIST := -n $(CORES) --dist loadfile --no-loadscope-reorder
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(XDIST)

test: install  ## the tests; those that need a GPU are skipped without one
	$(PYTEST) --durations=15

test-quick: install  ## the fast ones, in a minute and a half
	$(PYTEST) -m "not slow"

# A lesser CPU than this one: torch, oneDNN and simplclip each have a variable for it. Most desktop CPUs have AVX2 alone, many
# servers AVX-512 without instructions for bfloat16.
CPU ?= avx2
ONEDNN_avx2 := AVX2
ONEDNN_avx512 := AVX512_CORE
ONEDNN_avx512_bf16 := AVX512_CORE_BF16
test-cpu: export ATEN_CPU_CAPABILITY = $(patsubst avx512%,avx512,$(CPU))
test-cpu: export ONEDNN_MAX_CPU_ISA = $(ONEDNN_$(CPU))
test-cpu: export SIMPLCLIP_CPU_ISA = $(CPU)
test-cpu: install  ## ops, losses, memory as on a CPU=avx2, avx512, avx512_bf16
	@$(if $(ONEDNN_$(CPU)),,$(error CPU: expected avx2, avx512 or avx512_bf16, got $(CPU)))
	@if grep -qw $(CPU:avx512=avx512bw) /proc/cpuinfo; then set -x; \
		$(PYTEST) tests/plan tests/ops/test_memory.py tests/ops/test_compile.py && $(PYTEST) -m "not slow" tests/ops tests/losses; \
	else echo "skipped: this CPU has no $(CPU)"; fi

prove: install  ## all proofs at full length, about 75 minutes
	SIMPLCLIP_CUDA_ARCHS=all PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --quiet --no-build-isolation -e .
	$(PYTEST) --prove
	$(MAKE) sanitize aot oldest

sanitize: install  ## random calls of the CPU kernels under ASan, UBSan, TSan; CASES=2000
	$(BIN)/python tests/support/package/sanitized.py --cases $(or $(CASES),2000)
	$(BIN)/python tests/support/package/sanitized.py --threads --cases $(or $(CASES),2000)

test-gpu: install  ## the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

plan: install  ## hours of a run and costs of fine-tuning, predicted; tables
	$(BIN)/python -m benchmarks.plan

bench: install  ## time and memory of the ops on this CPU; writes benchmarks/results
	$(BIN)/python -m pytest benchmarks --benchmark-json benchmarks/results/cpu-$$(date +%F).json

bench-gpu: install  ## selftest, timings; writes benchmarks/results
	$(BIN)/python -m benchmarks.gpu

aot: install  ## compile all GPU kernels for all architectures; fails on a spill
	PYTHONPATH=tests $(BIN)/python -m gates $(AOT)

# Runs in a copy of the tracked files, so that the extensions for two versions of torch do not mix. The trainer and its data are tested with the newest torch alone.
OPS_TESTS := tests/ops tests/kernels tests/losses tests/package/test_build.py
OLDEST_TORCH = $(shell sed -nE 's/^ *"torch>=([0-9.]+)".*/\1/p' pyproject.toml | sort -V | head -n 1)

$(OLDEST)/.installed: pyproject.toml
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip setuptools ninja
	$(OLDEST)/bin/python -m pip install --quiet 'torch==$(OLDEST_TORCH).*' torchvision numpy
	$(call ADD_NVCC,$(OLDEST)/bin)
	touch $@

oldest: install $(OLDEST)/.installed  ## the tests of ops and kernels with the oldest torch
	rm -rf build/oldest && mkdir -p build/oldest
	tree=$$(git stash create) && git archive $${tree:-HEAD} | tar -x -C build/oldest
	cd build/oldest && PATH="$(abspath $(OLDEST)/bin):$$PATH" python -m pip install --quiet --no-build-isolation -e '.[test]'
	SIMPLCLIP_OTHER_PYTHON=$(OLDEST)/bin/python $(BIN)/python -m pytest --prove tests/package/test_packages.py
	cd build/oldest && OMP_NUM_THREADS=1 $(abspath $(OLDEST))/bin/python -m pytest -q $(XDIST) $(OPS_TESTS)
	cd build/oldest && PYTHONPATH=tests $(abspath $(OLDEST))/bin/python -m gates $(AOT)

# Removes the list of files that an earlier build wrote. Builds the wheel from the source distribution, for all architectures.
dist: install  ## source distribution and a wheel for this machine in dist/
	rm -rf simplclip.egg-info
	SIMPLCLIP_CUDA_ARCHS=$${SIMPLCLIP_CUDA_ARCHS:-all} PATH="$(abspath $(BIN)):$$PATH" \
		$(BIN)/python -m build --no-isolation --outdir $(DIST)

# The libraries of torch and of its CUDA stay outside the wheel: a process that loads the extensions has loaded torch.
wheel: dist  ## the same with a manylinux wheel, which PyPI takes
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair --wheel-dir $(DIST) \
		--exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcudart.so.*' $(DIST)/*-linux_*.whl
	rm $(DIST)/*-linux_*.whl

wheel-test: wheel  ## try that wheel in an empty venv: doctor, selftest, a training step
	$(BIN)/python tests/support/package/wheel.py $(DIST)/*.whl --train --packages-of $(BIN)/python

api: install  ## pages of the public names, from their docstrings, in build/api
	EAGER_IMPORT=1 $(BIN)/python -m pdoc --docformat google --output-directory build/api simplclip

lint: install lint-source  ## ruff, the contracts of imports, mypy
	$(BIN)/python -m mypy

# Needs no torch. Imports are checked in a copy, in which simplclip/kernels is a folder, not a link, and a package, as
# import-linter asks.
lint-source:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/lint && mkdir -p build/lint && cp -rL simplclip build/lint && touch build/lint/simplclip/kernels/__init__.py
	cd build/lint && PYTHONPATH=. $(abspath $(BIN))/lint-imports --no-cache --config ../../pyproject.toml

clean:  ## remove what was built; keeps data, runs and venvs
	rm -rf build dist *.egg-info simplclip/*.so
