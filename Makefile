# make install | make test | make demo: each does the set-up that it needs, from a fresh clone with Python 3.11+.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.offramp-installed
export OMP_NUM_THREADS ?= 2

.PHONY: install test check sanitize demo clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard src/offramp/_kernel/*.?pp)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "offramp needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". What to do: make PYTHON=python3.12 install")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[smp,text,search,report,data,video,dev]'
	touch $@

check: install
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest

# The compiled kernel under the address and undefined-behaviour sanitizers: a driver of its own, no Python in it. Tiles
# are emulated, so that each of their loads and stores is seen. `make test` runs it too, where the compiler has them.
SANITIZED := $(patsubst %.cpp,build/sanitized/%.o,$(wildcard src/offramp/_kernel/*.cpp) tests/kernel/sanitize.cpp)
SANITIZERS := -std=gnu++17 -O1 -g -pthread -fsanitize=address,undefined -fno-sanitize-recover=all

build/sanitized/%.o: %.cpp $(wildcard src/offramp/_kernel/*.hpp)
	@mkdir -p $(@D)
	$(CXX) $(SANITIZERS) -DOFFRAMP_EMULATE_TILES=1 -c $< -o $@

sanitize: $(SANITIZED)
	$(CXX) $(SANITIZERS) $^ -o build/sanitized/run
	build/sanitized/run

demo: install
	$(BIN)/offramp demo

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
