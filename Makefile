# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# The `encodec` package asks for torchaudio, whose wheels ask for CUDA; the tests need neither (tests/peers.py).
PEERS := encodec==0.1.1 einops

.PHONY: demo test test-all test-newest lint docs cards notebooks screenshot gpu gpu-rehearsal bench bench-streaming bench-memory bench-lm bench-training bench-tokenize clean

demo: $(VENV)/.demo
	$(BIN)/modeling-encodec demo --out demo_output --force

test: $(VENV)/.dev lint
	$(BIN)/python -m pytest -q -n 2 -m "not slow"

test-all: $(VENV)/.dev lint
	$(BIN)/python -m pytest -q -n 2

# The newest that pyproject.toml allows, whatever constraints.txt says, in an environment of its own. The newest torch may
# be gigabytes of CUDA: `make test-newest TORCH=torch==2.13.0` keeps to the build that constraints.txt names.
TORCH ?= torch
NEWEST := .venv-newest/bin/python -m
test-newest:
	test -d .venv-newest || $(PYTHON) -m venv .venv-newest
	$(NEWEST) pip install --quiet --upgrade --upgrade-strategy eager --editable ".[dev]" "$(TORCH)"
	$(NEWEST) pip install --quiet --upgrade --no-deps $(PEERS)
	$(NEWEST) pip freeze | grep -E "^(accelerate|datasets|huggingface[-_]hub|numpy|torch|transformers)=="
	$(NEWEST) pytest -q -n 2 -m "not slow"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --config-file model_cards/docs/mkdocs.yml
	@echo "the site is in build/docs; for its search: $(BIN)/python -m http.server --directory build/docs"

notebooks: $(VENV)/.dev
	$(BIN)/python tests/notebooks.py

screenshot: $(VENV)/.dev
	$(BIN)/python tests/web_browser.py model_cards/web_demo.png

cards: $(VENV)/.dev
	$(BIN)/python -m modeling_encodec.conversion.model_card model_cards/

# On a machine with a GPU, without a network; `make gpu PARTS="devices codec"` takes parts alone. Neither needs more than
# torch and transformers: the environment's Python where there is one, or the machine's.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu:
	$(GPU_PYTHON) tests/gpu/measure $(PARTS)

gpu-rehearsal:
	$(GPU_PYTHON) tests/gpu/measure --rehearse --out build/gpu_rehearsal $(PARTS)

bench: $(VENV)/.dev
	$(BIN)/python tests/benchmarks/bench_codec.py

bench-streaming: $(VENV)/.dev
	$(BIN)/python tests/benchmarks/bench_streaming.py

bench-memory: $(VENV)/.dev
	$(BIN)/python tests/benchmarks/bench_memory.py

bench-lm: $(VENV)/.dev
	$(BIN)/python tests/benchmarks/bench_lm.py

bench-training: $(VENV)/.dev
	$(BIN)/python tests/benchmarks/bench_training.py

bench-tokenize: $(VENV)/.dev
	$(BIN)/python tests/benchmarks/bench_tokenize.py

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.demo: $(VENV)/.venv pyproject.toml constraints.txt
	$(INSTALL) --editable ".[demo]"
	touch $@

$(VENV)/.dev: $(VENV)/.venv pyproject.toml constraints.txt
	$(INSTALL) --editable ".[dev]"
	$(INSTALL) --no-deps $(PEERS)
	touch $@

clean:
	rm -rf $(VENV) .venv-newest build dist demo_output *.egg-info
