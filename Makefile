# Two commands need nothing but python3 and a C++ compiler; they set up everything else themselves, in .venv:
#   make bench     measure on this device and write a report (ARGS="--quick" and the like go to the benchmark)
#   make test      run the tests but for the slow ones       (ARGS="-k lstm" and the like go to pytest)
#
# make check       ruff, formatting, types, all the tests   make lint      the first three
# make gpu-day     on a machine with a GPU: self-check, tuning, tests and suites, by default within 25 minutes, into
#                  benchmarks/results/<device> (ARGS="--minutes 8 --archive FILE": in order of worth, and one file with all of it)
# make library     compile the native library into fastseq/lib
# make sanitize    the CPU kernels of every level that this machine has under sanitizers; a short form is among the tests
# make host-kernels  compile the CUDA kernels for this machine's CPU, for tests without a GPU
# make docs        the documentation site, with the reports of committed results, into build/docs/html; a warning is an error
# make abi         one library file, loaded by CPU torch 2.13.0 and by CUDA torch 2.14.1 (downloads the latter, 5 GB)
# make wheel       a wheel in dist/, with the library, its platform tag checked, run in a bare environment
# make clean       remove what was built, keep .venv
#
# PYTHON=/path/to/python uses that environment as it is, and no network.
# FASTSEQ_BUILD=auto|cuda|cpu|none chooses the library (see setup.py).
# Without a GPU torch's CPU build is fetched; TORCH_INDEX=https://download.pytorch.org/whl/cu130 or the like chooses another one.

ARGS ?=
# One process per core, but what shares a group (builds in one folder, say) in one.
PARALLEL ?= -n auto --maxprocesses 8 --dist loadgroup
TORCH_INDEX ?=
FASTSEQ_BUILD ?= auto
export FASTSEQ_BUILD

ifeq ($(strip $(PYTHON)),)
  VENV := .venv
  PY := $(VENV)/bin/python
  BENCH := $(VENV)/.bench
  TOOLS := $(VENV)/.requirements
  KERNELS := $(VENV)/.kernels
  EDITABLE := $(VENV)/.editable
  BROWSER := $(VENV)/.browser
  SITE := $(VENV)/.docs
  # Tests that fetch build tools from a package index run in this environment only.
  export FASTSEQ_TEST_NETWORK ?= 1
else
  PY := $(PYTHON)
  BENCH :=
  TOOLS :=
  KERNELS :=
  EDITABLE :=
  BROWSER :=
  SITE :=
endif
ENVIRONMENT := $(TOOLS) $(EDITABLE)
PIP := $(PY) -m pip --disable-pip-version-check

SOURCES := CMakeLists.txt setup.py fastseq/_version.py $(shell find csrc -type f)
LIBRARY := fastseq/lib/.built-$(FASTSEQ_BUILD)
# The first report soon: where there is no library yet, one for this machine alone. Whatever else needs one builds the rest.
ifeq ($(MAKECMDGOALS)$(wildcard $(LIBRARY)),bench)
  LIBRARY := fastseq/lib/.built-native
  export FASTSEQ_BUILD_LEVELS := native
  ifeq ($(FASTSEQ_BUILD)$(wildcard /dev/nvidia*),auto)
    FASTSEQ_BUILD := cpu
  endif
endif

.PHONY: test check lint format bench gpu-day library host-kernels sanitize docs wheel abi clean

test: $(ENVIRONMENT) $(KERNELS) $(LIBRARY) $(BROWSER) $(SITE)
	-@$(PY) tests/csrc/host_build.py
	$(PY) -m pytest $(PARALLEL) -m "not slow" $(ARGS)

check: lint $(ENVIRONMENT) $(KERNELS) $(LIBRARY) $(BROWSER) $(SITE)
	-@$(PY) tests/csrc/host_build.py
	$(PY) -m pytest $(PARALLEL) $(ARGS)

lint: $(TOOLS) $(KERNELS)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -q tests/test_typing.py

format: $(TOOLS)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(BENCH) $(EDITABLE) $(LIBRARY)
	$(PY) -m fastseq bench $(ARGS)

# It takes the library that is there, or builds one.
gpu-day: $(ENVIRONMENT) $(KERNELS)
	$(PY) -m fastseq.benchmarks.gpu.day $(ARGS)

library: $(BENCH) $(EDITABLE) $(LIBRARY)

host-kernels: $(TOOLS)
	$(PY) tests/csrc/host_build.py

sanitize: $(TOOLS)
	$(PY) tests/csrc/cpu_build.py $(ARGS)

docs: $(ENVIRONMENT) $(LIBRARY) $(SITE)
	$(PY) -m sphinx --quiet --fail-on-warning --keep-going -t reports -d build/docs/doctrees docs build/docs/html
	$(PY) -m fastseq.benchmarks.publish build/docs/html/reports

wheel: $(TOOLS)
	rm -f dist/*.whl
	$(PIP) wheel . --no-deps --no-build-isolation -w dist
	$(PY) .ci/wheel.py dist/*.whl

$(LIBRARY): $(SOURCES) $(BENCH)
	$(PY) setup.py --quiet build_native --inplace
	@rm -f fastseq/lib/.built-*
	@touch $@

.venv/.bench: requirements/bench.txt
	@python3 -c "import sys; sys.exit(sys.version_info < (3, 10) and 'error: Python 3.10 or newer is needed, python3 is ' + sys.version.split()[0])"
	test -x .venv/bin/python || python3 -m venv .venv
	$(PY) tools/install_torch.py $(shell grep '^torch==' requirements/bench.txt) $(if $(TORCH_INDEX),--index $(TORCH_INDEX))
	$(PIP) install -r requirements/bench.txt
	@touch $@

.venv/.requirements: requirements/dev.txt .venv/.bench
	$(PIP) install -r requirements/dev.txt
	@touch $@

# What tests of GPU kernels want where there is no GPU; nothing else asks for it.
.venv/.kernels: requirements/triton.txt requirements/cute.txt .venv/.requirements
	$(PY) -c "import importlib.util as u, sys; sys.exit(u.find_spec('triton') is None)" || $(PIP) install -r requirements/triton.txt
	$(PIP) install --no-deps -r requirements/cute.txt
	@touch $@

# For the tests of the report alone, which are skipped without it.
.venv/.browser: requirements/browser.txt .venv/.requirements
	@$(PIP) install -r $< && touch $@ || echo "no browser for this machine: the tests that want one are skipped"

# For the documentation, which is no part of the tests without it.
.venv/.docs: requirements/docs.txt .venv/.requirements
	@$(PIP) install -r $< && touch $@ || echo "no Sphinx: the tests that build the documentation are skipped"

# After the library: the install finds it up to date. It gives the command `fastseq` and lets scripts anywhere import the checkout.
.venv/.editable: pyproject.toml setup.py .venv/.bench | $(LIBRARY)
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

abi: $(ENVIRONMENT) $(LIBRARY)
	$(PY) .ci/abi.py --cuda-torch 2.14.1

clean:
	rm -rf build dist *.egg-info fastseq/lib .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
