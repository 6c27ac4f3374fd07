# nydus-erofs: `make` alone prints this help. A target that is not listed is not supported.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := erofs builder fscache kata overlayfs_helper vm-images
PYTEST := $(BIN)/python -m pytest
# Where /tmp is a tmpfs, the kernel takes no pre-content marks on it.
export TMPDIR ?= /var/tmp

.PHONY: help
help: ## this text
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: install
install: $(STAMP) ## make .venv with the console scripts
	@# Programs start in half of the time, also where PYTHONDONTWRITEBYTECODE is set.
	@$(BIN)/python -m compileall -q $(SOURCES)

$(STAMP): pyproject.toml constraints.txt .ci/venv
	@PYTHON=$(PYTHON) .ci/venv $(VENV)
	@touch $@

.PHONY: install-helper
install-helper: install ## put nydus-overlayfs where containerd and mount(8) find it; root
	@$(BIN)/python -m overlayfs_helper.install $(HELPER_ARGS)

.PHONY: demo
demo: install ## build a real root filesystem, mount it lazily, run programs from it
	@.ci/packages mmdebstrap tar
	@$(BIN)/python -m tests.demo

.PHONY: test
test: install ## all tests that need no other machine; kernel tests when root
	@.ci/packages erofs-utils attr acl libcap2-bin e2fsprogs tar \
		fuse3 cryptsetup-bin fdisk openssl qemu-utils qemu-system-common busybox-static
	@# Status 5 is that PYTEST_ARGS choose nothing of a part.
	@$(PYTEST) -n auto --dist worksteal --ignore=tests/real --ignore=tests/vm \
		--ignore=tests/integration $(PYTEST_ARGS) || [ $$? = 5 ]
	@# Two at a time, not one a core: mounts and kills have time limits.
	@$(PYTEST) -n 2 --dist loadfile tests/integration $(PYTEST_ARGS) || [ $$? = 5 ]

.PHONY: test-long
test-long: install ## kill series and large trees, many minutes
	@$(PYTEST) --ignore=tests/real --ignore=tests/vm -m long $(PYTEST_ARGS)

.PHONY: test-real
test-real: install ## containers by containerd and nydus-snapshotter, builds by BuildKit; needs root and Go
	@.ci/packages containerd docker-registry fuse3 runc skopeo umoci busybox-static
	@$(BIN)/python -m tests.real.peers
	@$(PYTEST) tests/real $(PYTEST_ARGS)

.PHONY: test-vm
test-vm: install ## tests in virtual machines under other kernels, which Debian has; best as root
	@.ci/packages qemu-system-x86 qemu-system-common busybox-static kmod zstd lz4 e2fsprogs \
		qemu-utils cryptsetup-bin dmsetup fdisk
	@vm-images/run --fetch || echo "some kernels could not be made; what needs them says so" >&2
	@$(PYTEST) tests/vm $(PYTEST_ARGS)

.PHONY: lint
lint: install ## ruff, mypy, import contracts, spelling
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@PYTHONPATH=vm-images $(BIN)/lint-imports
	@$(BIN)/codespell $(SOURCES) tests docs README.md CHANGELOG.md CONTRIBUTING.md

.PHONY: format
format: install ## put the code into ruff's form
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

.PHONY: bench
bench: install ## measure against floors, and peers named by NYDUS_IMAGE_PEER, NYDUSD_PEER, NYDUS_OVERLAYFS_PEER, NYDUSIFY_PEER
	@$(BIN)/python -m tests.bench

.PHONY: fuzz
fuzz: install ## fuzz every reader with atheris, FUZZ_SECONDS (60) each
	@$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[fuzz]' && \
	for target in tests/fuzz/fuzz_*.py; do \
		echo "== $$target"; \
		$(BIN)/python $$target -max_total_time=$(or $(FUZZ_SECONDS),60) || exit 1; \
	done

.PHONY: golden
golden: install ## write the golden images of tests/golden again
	@$(BIN)/python -m tests.golden.make

.PHONY: clean
clean: ## remove .venv and everything that was made here
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis \
		.import_linter_cache .benchmarks
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
