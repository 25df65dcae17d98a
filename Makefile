# make demo and make test need nothing but Python 3.11+; both install into .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint wheel compile-gate compile-matrix clean

demo: .venv/installed
	$(BIN)/relibra demo

test: .venv/installed
	$(BIN)/python -m pytest -q

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: .venv/installed
	$(BIN)/python -m build --wheel --outdir dist .

# No GPU needed. The gate: one config a kernel with the newest Triton. The matrix: all of them, also with the oldest.
TARGETS := sm_80 sm_90 sm_100 gfx942 gfx950

compile-gate: .venv/triton-3.9.0
	for target in $(TARGETS); do PYTHONPATH=$< $(BIN)/relibra compile --target $$target --first || exit 1; done

compile-matrix: .venv/triton-3.9.0 .venv/triton-3.6.0
	for triton in $^; do for target in $(TARGETS); do \
		echo "$$triton $$target"; PYTHONPATH=$$triton $(BIN)/relibra compile --target $$target || exit 1; \
	done; done

.venv/triton-%: | .venv/installed
	$(BIN)/python -m pip install --quiet --no-deps --target $@ triton==$*

clean:
	rm -rf .venv build dist demo-output *.egg-info

# torch first and alone: with it installed, nothing that follows pulls another build of it.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[transformers,plot,dev]'
	touch $@
