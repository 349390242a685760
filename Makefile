# make demo   install, run the small grid on real data, print its table, write its report
# make test   install, check, run all tests but the long ones
# make test-long  the long ones: layouts, repeated kills, a cluster under chaos, whole grids
# make test-processors  the quantizers' tests as on processors with fewer vector instructions
# make check  lint, types, import order, fast tests
# make bench  measure: a quarter of an hour; writes benchmarks/RESULTS.md
# make gpu    everything that only a GPU shows, in under 25 minutes; DATA=folder names where CIFAR-10 lies
# make gpu-wheels  what make gpu needs on a machine that has torch and reaches no registry
# make setup  .venv with everything, the system packages that FFCV is built from, SLURM and Chromium for the tests

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
APT_PACKAGES := pkg-config libopencv-dev libturbojpeg0-dev dataset-fashion-mnist
SLURM_PACKAGES := slurm-wlm slurmdbd slurm-wlm-mysql-plugin munge mariadb-server
BROWSER_PACKAGES := chromium
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: demo test test-long test-processors check bench gpu gpu-wheels setup system slurm browser clean
.DEFAULT_GOAL := check

demo: setup
	$(BIN)/python -m launch grid digits --local --choices digits
	$(BIN)/python -m analysis tables digits
	@echo && echo 'What that means, in words and figures:'
	@$(BIN)/python -m analysis report digits

# One thread for each process that the tests start: two OpenMP programs at once slow each other a hundredfold.
# Two files of tests at a time.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
test: setup lint
	$(PYTEST) --numprocesses 2 --dist loadfile -m "not long"

test-long: setup
	$(PYTEST) --numprocesses 2 --dist loadfile -m long

# torch has kernels for several levels of vector instructions, which round differently, and takes the best that the
# processor has. A processor with AVX-512 shows all three.
test-processors: setup
	for level in default avx2; do \
		ATEN_CPU_CAPABILITY=$$level $(PYTEST) -q --numprocesses 2 --dist loadfile tests/quantizers tests/conformance || exit 1; \
	done

check: setup lint
	$(PYTEST) -q --numprocesses 2 --dist loadfile -m "not slow and not long"

bench: setup
	$(BIN)/python benchmarks/run_all.py

gpu: setup
	$(BIN)/python benchmarks/gpu.py $(if $(DATA),--data-dir $(DATA))

gpu-wheels: setup
	$(BIN)/python benchmarks/gpu_wheels.py

.PHONY: lint
lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt Makefile
	@$(MAKE) --no-print-directory system
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,deepspeed]'
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[ffcv]' \
		|| echo 'FFCV was not built; all but the FFCV loader works without it. It needs: $(APT_PACKAGES)'
	@touch $@

# FFCV compiles against OpenCV and TurboJPEG. Without the right to install them, say what to install and go on.
system: slurm browser
	@if pkg-config --exists opencv4 libturbojpeg 2>/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		apt-get install -y -qq --no-install-recommends $(APT_PACKAGES) >/dev/null; \
	else \
		echo 'For FFCV, install OpenCV and TurboJPEG; on Debian: sudo apt-get install $(APT_PACKAGES)'; \
	fi

# For tests/cluster, which start their own daemons: where installing would start the system's, it is left to people.
slurm:
	@if dpkg -s $(SLURM_PACKAGES) >/dev/null 2>&1; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& { [ -x /usr/sbin/policy-rc.d ] || [ ! -d /run/systemd/system ]; } \
		&& apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		apt-get install -y -qq --no-install-recommends $(SLURM_PACKAGES) >/dev/null; then :; \
	else \
		echo 'For the tests on a real SLURM cluster; on Debian: sudo apt-get install $(SLURM_PACKAGES)'; \
	fi

# For the tests that open a report as its readers do.
browser:
	@if command -v chromium >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		apt-get install -y -qq --no-install-recommends $(BROWSER_PACKAGES) >/dev/null; then :; \
	else \
		echo 'For the tests in a real browser; on Debian: sudo apt-get install $(BROWSER_PACKAGES)'; \
	fi

clean:
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
