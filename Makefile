# `make demo` and `make test` need Python 3.11 or newer and make; everything else is fetched into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet -c constraints.txt

.NOTPARALLEL:
.PHONY: demo test test-part gpu bench host first-call mutants audit prove planted audit-part triton trainer lint format types docs dist hub-kernels clean help

help:
	@echo "make demo    features of a photograph, in an environment made for it"
	@echo "make test    the test suite"
	@echo "make gpu     the GPU's tests, by the Python that PYTHON names, with what is installed there (10 minutes)"
	@echo "make bench   whole networks beside timm's, by the Python that PYTHON names, a piece of under 10 minutes (exit status 75: again)"
	@echo "make host    time of a forward and of a launch on the host, without a GPU (a minute)"
	@echo "make first-call   seconds of a network's first forwards, which compile its kernels, without a GPU (two minutes)"
	@echo "make mutants planted faults in the kernels, each of which the tests must catch (hours)"
	@echo "make audit   every kernel compiled for every GPU it is for, and held to rules (three quarters of an hour, then from a cache)"
	@echo "make prove   every operation as compiled for every GPU, executed on the CPU (many hours, goes on where it stopped)"
	@echo "make planted faults planted in compiled kernels, each of which must be seen (ten minutes)"
	@echo "make audit-part TRITON=3.9.0   a part of the audit with another Triton (20 minutes)"
	@echo "make test-part TRITON=3.9.0    the kernels' tests with another Triton (three to seven minutes)"
	@echo "make trainer training with NetsPresso Trainer's own package, in two processes on the CPU (two to four minutes)"
	@echo "make docs    the documentation as a site in build/site"
	@echo "make dist    source distribution and wheel in dist/, checked"
	@echo "make hub-kernels   the kernels in the layout of Hugging Face's kernels hub, in hub-kernels/, which make clean keeps"
	@echo "make lint    style and format; schemas of workflows and citation"
	@echo "make types   mypy, on the package as it is installed"
	@echo "make format  let ruff fix what it can"
	@echo "make clean   remove the environment and everything made"

# One environment, filled by stages; a stamp file marks each.
$(VENV)/demo.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[demo]'
	touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[dev]'
	touch $@

$(VENV)/docs.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[docs]'
	touch $@

demo: $(VENV)/demo.stamp
	mkdir -p demo
	$(BIN)/python -c "from skimage import data, io; io.imsave('demo/astronaut.png', data.astronaut())"
	$(BIN)/effformer run demo/astronaut.png --beside

# On a CPU, also where there is a GPU: `make gpu` is for that. The interpreter multiplies by NumPy: the workers, one for
# each core, would wait for each other's threads (a network took 41 s instead of 16).
test: $(VENV)/dev.stamp
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal -m "not gpu"

# PYTHON's environment stays as it is, without downloads, builds or installs: a machine with a GPU has its own torch and
# triton, and may lack a network, setuptools or wheel. The package is copied to build/gpu; first, one line says what
# PYTHON lacks.
NEEDED := torch triton yaml safetensors numpy

# LIMIT is in seconds, SUITE holds further arguments of tests/gpu/suite.py. Without a GPU the suite itself is checked.
LIMIT ?= 530
gpu:
	@$(PYTHON) tests/plain.py build/gpu pytest $(NEEDED)
	PYTHONPATH=$(CURDIR)/build/gpu $(PYTHON) -P tests/gpu/suite.py --limit $(LIMIT) $(SUITE)

# BENCH holds further arguments of `effformer bench`; with `--device cpu` among them it needs no GPU. Make's own exit
# status is 2 for any other than 0: 75 is printed.
bench:
	@$(PYTHON) tests/plain.py build/gpu $(NEEDED) $(if $(filter %cpu --list --help,$(BENCH)),,gpu)
	PYTHONPATH=$(CURDIR)/build/gpu $(PYTHON) -P -m effformer.cli bench $(BENCH)

# HOST holds further arguments: --repeats, --out.
host: $(VENV)/dev.stamp
	$(BIN)/python -m effformer.bench.host.measure $(HOST)

first-call: $(VENV)/dev.stamp
	$(BIN)/python -m effformer.bench.host.first_call
	$(BIN)/python -m effformer.bench.host.first_call --threads 1

mutants: $(VENV)/dev.stamp
	$(BIN)/python tests/mutants.py

audit: $(VENV)/dev.stamp
	$(BIN)/python -m effformer.bench.offline.audit --output bench/results/audit.jsonl $(AUDIT)

# PROVE holds further arguments: --models, --targets, --dtypes, --batches, --kinds, --minutes. Each worker has a core.
prove: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m effformer.bench.offline.prove $(PROVE)

planted: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m effformer.bench.offline.planted

# The next targets use the Triton that TRITON names, not that of constraints.txt. torch stays that of .venv. The
# interpreter of Triton 3.6 fails with NumPy 2.4.
OTHER := $(CURDIR)/build/triton-$(TRITON)
triton: $(VENV)/dev.stamp
	$(if $(TRITON),,$(error TRITON: give a version of Triton, such as TRITON=3.9.0))
	test -d $(OTHER)/numpy || $(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(OTHER) triton==$(TRITON) "numpy<2.4"

KERNEL_TESTS := $(addprefix tests/test_,kernels.py kernel_models.py kernel_shapes.py kernel_values.py split.py conv_norm.py \
	operators.py plan.py live.py live_modules.py host.py backward.py backward_use.py train_mode.py train_networks.py)
test-part: triton
	PYTHONPATH=$(OTHER) TRITON_INTERPRET=1 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest \
		--numprocesses logical --maxprocesses 8 --dist worksteal -m "not gpu" $(KERNEL_TESTS)

audit-part: triton
	PYTHONPATH=$(OTHER) $(BIN)/python -m effformer.bench.offline.audit --part --dtypes bfloat16 float32 \
		--output bench/results/audit-$(TRITON).jsonl $(AUDIT)

# NetsPresso Trainer asks for an older Pillow than the extras, and for packages that training does not import. So it and
# its imports get a folder of their own, without dependencies, in front of .venv. A missing package fails the test.
TRAINER := build/trainer
TRAINER_NEEDS := netspresso-trainer absl-py fvcore grpcio iopath loguru markdown opencv-python-headless pandas portalocker \
	tabulate tensorboard termcolor werkzeug yacs
$(TRAINER)/stamp: constraints.txt $(VENV)/dev.stamp
	rm -rf $(TRAINER)
	$(PIP) --no-deps --target $(TRAINER) $(TRAINER_NEEDS)
	touch $@

trainer: $(TRAINER)/stamp
	PYTHONPATH=$(CURDIR)/$(TRAINER) EFFFORMER_TRAINER=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
		tests/test_netspresso_train.py::test_the_real_trainer_trains_ours_in_two_processes

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/zizmor --quiet --offline --strict-collection .github

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy does not follow an editable install: check a copy laid out as users get it.
types: $(VENV)/dev.stamp
	rm -rf build
	$(PIP) --no-deps --no-build-isolation --target build/types .
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p effformer

# Strict: a link that leads nowhere or a docstring of other arguments than the function's fails.
docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# An old list of sources would let files in that no longer belong there.
dist: $(VENV)/dev.stamp
	rm -rf dist *.egg-info
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

hub-kernels: $(VENV)/dev.stamp
	$(BIN)/python -m effformer.bench.release.hub_kernels --out $@

clean:
	rm -rf $(VENV) build demo dist *.egg-info
