# make up       install, build, start a node in the foreground      make test   all tests
# make demo     the same pipeline over recorded events, no root     make bench  the figures of docs/performance.md
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3.11
STELLA := $(BIN)/stella
CONFIG ?= node/stellaops.yaml

# What Debian must provide to build the native parts, and what the tests run beside.
BUILD_PACKAGES := clang llvm gcc libc6-dev make libelf-dev zlib1g-dev python3-venv
TEST_PACKAGES := docker.io podman busybox-static iproute2 bpftool openssl softhsm2 strace zstd
# Whose answers about symbols ours are held to, and what makes programs for it.
TEST_PACKAGES += binutils g++ musl-tools libc6-dbg
# The engine that runs deploy/ is unpacked, not installed, and these run it; systemd's own checker of units.
TEST_PACKAGES += iptables mmdebstrap runc systemd
# Node may have come another way than from Debian.
TEST_PACKAGES += $(if $(and $(shell command -v node),$(shell command -v npm)),,nodejs npm)
# The independent Sigstore implementations of the tests.
NODE_MODULES := tests/sigstore/node_modules/installed

.PHONY: up demo install ready engine test crash-matrix faults fuzz lint check bench bench-docs bench-needs soak bench-signing bench-verify \
	bench-redaction bench-symbols bench-containers bench-functions bench-bus-sync reference sbom audit lock clean system-build system-test

up: install
	@if [ "$$(id -u)" != 0 ]; then \
	  echo "make up needs root (to load BPF programs): run 'sudo make up', or try 'make demo', which needs no privilege."; exit 3; fi
	$(STELLA) signals init --config $(CONFIG)
	$(STELLA) signals start --config $(CONFIG)

demo: install
	$(STELLA) signals start --demo --target demo/evidence

# Only what is missing is asked of apt, so that an installed machine is not touched and no root is needed.
define need
	@missing=; for p in $(1); do dpkg -s $$p >/dev/null 2>&1 || missing="$$missing $$p"; done; \
	if [ -n "$$missing" ]; then \
	  if [ "$$(id -u)" != 0 ]; then echo "these packages are missing:$$missing (sudo apt-get install$$missing)"; exit 3; fi; \
	  echo "installing$$missing"; \
	  flock /tmp/stella-apt.lock sh -c "apt-get install -y --no-install-recommends $$missing || \
	    (apt-get update && apt-get install -y --no-install-recommends $$missing)" >/tmp/stella-apt.log 2>&1 \
	    || { tail -20 /tmp/stella-apt.log; exit 1; }; \
	fi
endef

system-build:
	$(call need,$(BUILD_PACKAGES))

system-test:
	$(call need,$(TEST_PACKAGES))

$(BIN)/python: | system-build
	$(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check 'setuptools>=75' 'wheel>=0.45' 'hatchling>=1.27,<2' 'editables>=0.5'

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml requirements.lock bpf/Makefile bpf/stella.bpf.c $(wildcard bpf/*.h bpf/include/*.h) $(wildcard */*/*.c */*/*/*.c) | $(BIN)/python
	$(MAKE) -s -C bpf PYTHON=$(abspath $(BIN)/python)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@
	@echo "installed: $(STELLA)"

$(NODE_MODULES): tests/sigstore/package.json tests/sigstore/package-lock.json | system-test
	cd tests/sigstore && npm ci --ignore-scripts --loglevel=error
	@touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What is downloaded, built and checked before the tests waits for other things each: side by side.
ready: lint $(NODE_MODULES) engine

# The container engine that tests/deploy unpacks.
engine: install system-test
	$(BIN)/python -c 'from tests.deploy import engine; engine.lacking() or engine.fetch()'

test:
	$(MAKE) -j3 --output-sync=target ready
	$(BIN)/python -m pytest

# Every system call of the signer on its files, failed and killed in turn: some minutes.
crash-matrix: install system-test
	$(BIN)/python -m tests.signer.crash_matrix

# A bus that stalls, dies, fills its disk or loses power, parts that hang, rates beyond the machine: the long forms.
faults: install system-test
	STELLA_FAULTS=long $(BIN)/python -m pytest tests/faults

# What reads strangers' documents, fuzzed for this long each; what is found stays in fuzz-findings/.
FUZZ_SECONDS ?= 60
fuzz: install
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/python -m pip install -q --disable-pip-version-check '$(shell sed -n 's/^fuzz = \["\(.*\)"\]/\1/p' pyproject.toml)'
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS)
	STELLA_MUTATIONS=$$(($(FUZZ_SECONDS) * 10)) $(BIN)/python -m pytest -q tests/evidence/test_mutations.py

# What a whole node holds, beside its peers: some 45 minutes; BENCH=--quick takes 4, BENCH=idle 1 (BENCH=--help).
BENCH_PACKAGES := bpftrace libbpf-tools python3-bpfcc linux-headers-$(shell dpkg --print-architecture 2>/dev/null) openssl
BENCH ?=
bench: install bench-needs
	$(BIN)/python -m tests.bench $(BENCH)

# The same, and its figures and plot go into docs/performance.md.
bench-docs: install bench-needs
	$(BIN)/python -m tests.bench --json docs/performance.json --docs docs/performance.md $(BENCH)

bench-needs: $(BIN)/python
	$(call need,$(BENCH_PACKAGES))
	@$(BIN)/python -c 'import matplotlib' 2>/dev/null || $(BIN)/python -m pip install -q --disable-pip-version-check '$(shell sed -n 's/^bench = \["\(.*\)"\]/\1/p' pyproject.toml)'

# How long root could rewrite history, and how fast chunks are signed and logged.
bench-signing: install
	$(BIN)/python -m tests.bench.signing

# Twenty minutes of even load: what grows, and whether every event is accounted for.
SOAK_MINUTES ?= 20
soak: install
	$(BIN)/python -m tests.bench.soak --minutes $(SOAK_MINUTES)

# What it costs that the bus syncs what it stores.
bench-bus-sync: install
	$(BIN)/python -m tests.bench.bus_sync

bench-symbols: install
	$(BIN)/python -m tests.bench.symbols

# Ten thousand watched functions: attaching, memory, a call.
bench-functions: install
	$(BIN)/python -m tests.bench.functions

bench-verify: install
	$(BIN)/python -m tests.bench.verify

bench-redaction: install
	$(BIN)/python -m tests.bench.redaction

# Short-lived containers of a real Docker Engine: how many keep id and image (root; CONTAINERS=200).
bench-containers: install system-test
	$(BIN)/python -m tests.bench.containers

reference: install
	$(BIN)/python -m stella_cli.reference docs/reference

# What each image is made of, one CycloneDX document for each, from the pinned packages of its extra.
sbom: install
	$(BIN)/python deploy/sbom.py sbom

# Known vulnerabilities of the pinned packages. Asks a public service; the script itself ends with 10 when it could not.
audit: install
	$(BIN)/python deploy/audit.py

# Rewrites requirements.lock from the ranges in pyproject.toml, in an environment without what other targets add.
lock: $(BIN)/python
	$(BIN)/python -m venv --clear $(VENV)/lock
	$(VENV)/lock/bin/python -m pip install -q '.[all,test]'
	$(VENV)/lock/bin/python -m pip freeze --exclude stella-signals --exclude pip --exclude setuptools > requirements.lock

clean:
	rm -rf $(VENV) dist sbom tests/deploy/.engine tests/sigstore/node_modules .mypy_cache .ruff_cache .pytest_cache .hypothesis
	$(MAKE) -s -C bpf clean
