# make demo and make test need nothing but Python 3.11+; both install into .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: docs demo test test-families test-two-hops test-megatron test-extras quick lint wheel release-check nightly compile-gate machine-code compile-matrix tune-offline check-configs clean
.PHONY: test-versions rehearse gpu carry collect quick-in-time

demo: .venv/installed
	$(BIN)/relibra demo

# Two processes, each with whole files, so that what a file's tests share is made once.
TEST := $(BIN)/python -m pytest -q -p no:benchmark --numprocesses 2 --dist loadfile

test: .venv/installed
	$(TEST)

# Under a minute on two cores, 8 s of it to collect all tests; what CI allows of CPU time is for a clone whose files are
# read for the first time, on cores that others use too.
collect: .venv/installed
	$(BIN)/python .ci/cpu_seconds.py 20 $(BIN)/python -m pytest --collect-only -qq

quick-in-time: .venv/installed
	$(BIN)/python .ci/cpu_seconds.py 100 $(MAKE) quick

# The planner, the layer in plain torch, and the rules of the house.
QUICK := planner test_imports.py test_public_api.py $(addprefix relibra_kernels/,test_nn.py test_moe_mlp.py \
	test_replica_reduce.py test_router.py test_schedule.py test_unpermute.py tuning/test_model.py)

quick: .venv/installed
	$(TEST) $(addprefix tests/,$(QUICK))

# Every Hugging Face MoE family under a plan, over two ranks; `make test` takes a sample.
test-families: .venv/installed
	RELIBRA_FAMILIES=all $(BIN)/python -m pytest -q tests/relibra_kernels/integrations/test_hf_families.py

# What the runtime's tests hold, with two hops wherever a test does not say how tokens travel.
test-two-hops: .venv/installed
	RELIBRA_TEST_TRANSPORT=two $(TEST) tests/relibra_kernels/parallel

# megatron-core in an environment of its own, and a GPT trained with it. MEGATRON=0.19.2: the newest, whose wheel is for
# Python 3.12 and is only unpacked.
MEGATRON ?= 0.16.1
MEGATRON_ENV := .venv/megatron-$(MEGATRON)
MEGATRON_TESTS := $(wildcard tests/relibra_kernels/integrations/test_megatron*.py) \
	tests/relibra_kernels/integrations/test_trainer_replay.py

test-megatron: $(MEGATRON_ENV)/installed
	RELIBRA_MEGATRON=required $(MEGATRON_ENV)/bin/python -m pytest -q $(MEGATRON_TESTS)

$(MEGATRON_ENV)/installed: pyproject.toml constraints.txt | .venv/installed
	$(PYTHON) -m venv $(MEGATRON_ENV)
	$(MEGATRON_ENV)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(MEGATRON_ENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable . \
		packaging einops psutil pytest scipy transformers
	$(MEGATRON_ENV)/bin/python -m pip install --quiet --no-deps mbridge==0.15.1
	$(MEGATRON_ENV)/bin/python -m pip install --quiet --no-deps $(if $(filter 0.16.%,$(MEGATRON)),,--python-version 3.12 \
		--only-binary=:all: --ignore-requires-python --target $(MEGATRON_ENV)/lib/python3.*/site-packages) megatron-core==$(MEGATRON)
	touch $@

# The notebook in a Jupyter kernel, the loggers' own files, torchtitan's MoE modules: an environment of its own on top of .venv.
test-extras: .venv/extras/installed
	MPLBACKEND=agg .venv/extras/bin/python -m pytest -q tests/test_loggers.py tests/test_notebook.py \
		tests/relibra_kernels/integrations/test_torchtitan.py

.venv/extras/installed: pyproject.toml | .venv/installed
	$(PYTHON) -m venv .venv/extras
	printf 'import site; site.addsitedir("%s")\n' "$(CURDIR)"/.venv/lib/python3.*/site-packages > beneath.pth
	mv beneath.pth .venv/extras/lib/python3.*/site-packages/
	.venv/extras/bin/python -m pip install --quiet tensorboard wandb prometheus-client nbclient ipykernel torchtitan==0.3.0
	touch $@

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The docs as a site in site/, in an environment of its own, and its links; without it they are plain Markdown.
docs: .venv/docs/installed
	NO_MKDOCS_2_WARNING=1 .venv/docs/bin/mkdocs build --strict --quiet
	.venv/docs/bin/python .ci/check_site.py site

.venv/docs/installed: mkdocs.yml
	$(PYTHON) -m venv .venv/docs
	.venv/docs/bin/python -m pip install --quiet mkdocs-material==9.8.2
	touch $@

wheel: .venv/installed
	$(BIN)/python -m build --wheel --outdir dist .

# The sdist, the wheel that is built from it, their metadata and types, and the API page.
release-check: .venv/installed
	rm -rf build dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python .ci/release_check.py

# What takes longer than .ci/run may.
nightly: .venv/installed
	RELIBRA_BROWSER=required bash .ci/run
	$(MAKE) demo
	$(MAKE) quick-in-time
	RELIBRA_COMMANDS=all $(BIN)/python -m pytest -q tests/test_commands.py
	$(BIN)/python bench/planned.py --rivals --layers 8
	$(MAKE) compile-matrix
	$(MAKE) check-configs
	$(MAKE) test-families
	$(MAKE) test-two-hops
	$(MAKE) test-megatron MEGATRON=0.19.2
	$(MAKE) test-extras
	$(MAKE) rehearse WHOLE=--whole
	$(MAKE) test-versions

# No GPU needed. The gate: one config a kernel with the newest Triton, and of one launch all that a search tries, another
# for every commit. The matrix: all of them, with the pin and the oldest too, whose cuobjdump cannot read sm_103's code.
TARGETS := sm_80 sm_90 sm_100 sm_103 gfx942 gfx950

compile-gate: .venv/triton-3.9.0
	for target in $(TARGETS); do PYTHONPATH=$< $(BIN)/relibra compile --target $$target --first || exit 1; done
	PYTHONPATH=$< $(BIN)/relibra compile --target sm_90 --candidates --sample 1 --seed "$(SEED)"

# What large batches get, with gates on the machine code; CI takes three models on two devices.
CODE_DEVICES ?= H100 A100 MI300X
CODE_MODELS ?= Qwen3-30B-A3B DeepSeek-V3 gpt-oss-120b

machine-code: .venv/triton-3.9.0
	for triton in none $<; do for device in H100 MI300X; do \
		PYTHONPATH=$$triton $(BIN)/relibra compile --device $$device $(CODE_MODELS:%=--model %) || exit 1; \
	done; done

compile-matrix: .venv/triton-3.9.0 .venv/triton-3.6.0
	for triton in none $^; do for target in $(TARGETS); do \
		case "$$triton $$target" in *triton-3.6*sm_103) continue;; esac; \
		echo "$$triton $$target"; PYTHONPATH=$$triton $(BIN)/relibra compile --target $$target || exit 1; \
	done; done
	for triton in none $^; do for device in $(CODE_DEVICES); do \
		echo "$$triton $$device"; PYTHONPATH=$$triton $(BIN)/relibra compile --device $$device || exit 1; \
	done; done
	for target in $(TARGETS); do $(BIN)/relibra compile --target $$target --candidates || exit 1; done

# Configs for GPUs that are not here, and the table of them in the docs. The first run compiles for an hour; what it
# compiled is kept in autotune_configs/.tune.
DEVICES := A100 H100 H200 B200 MI300X MI355X

tune-offline: .venv/installed
	for device in $(DEVICES); do \
		$(BIN)/relibra tune --model all --device $$device --out autotune_configs --resume || exit 1; \
	done
	$(BIN)/python bench/tuning_table.py --write docs/tuning.md

# All shipped configs compile for their device without spills. SAMPLE=n: only n of them, others for every commit.
SEED ?= $(shell git rev-parse HEAD)

check-configs: .venv/installed
	$(BIN)/relibra tune --check $(if $(SAMPLE),--sample $(SAMPLE) --seed "$(SEED)")

# The versions of Python, torch, Triton, numpy and transformers that are supported. VERSIONS names environments, checks or both.
VERSIONS ?=

test-versions: .venv/installed
	bash tests/versions.sh $(VERSIONS)

# What is measured on a GPU, and the same without one.
gpu:
	bash bench/gpu.sh

carry: .venv/installed
	PYTHON=$(BIN)/python bash bench/carry.sh

# WHOLE=--whole: every case, not two a stage.
rehearse: .venv/installed
	OUT=$${OUT:-$$(mktemp -d)} $(BIN)/python bench/gpu.py --rehearse $(WHOLE)

.venv/triton-%: | .venv/installed
	$(BIN)/python -m pip install --quiet --no-deps --target $@ triton==$*

clean:
	rm -rf .venv build dist site demo-output *.egg-info

# torch first and alone: with it installed, nothing that follows pulls another build of it. pip shows how far it is.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	@echo "Installing into .venv: torch first, the largest download, then the rest; a few minutes in all."
	$(BIN)/python -m pip install --constraint constraints.txt torch
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[transformers,plot,dev]'
	touch $@
