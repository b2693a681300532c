# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-all lint docs cards notebooks screenshot bench bench-streaming bench-memory bench-lm bench-training bench-tokenize clean

demo: $(VENV)/.demo
	$(BIN)/modeling-encodec demo --out demo_output --force

test: $(VENV)/.dev lint
	$(BIN)/python -m pytest -q -n 2 -m "not slow"

test-all: $(VENV)/.dev lint
	$(BIN)/python -m pytest -q -n 2

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

# The `encodec` package asks for torchaudio, whose wheels ask for CUDA; the tests need neither (tests/peers.py).
$(VENV)/.dev: $(VENV)/.venv pyproject.toml constraints.txt
	$(INSTALL) --editable ".[dev]"
	$(INSTALL) --no-deps encodec==0.1.1 einops
	touch $@

clean:
	rm -rf $(VENV) build dist demo_output *.egg-info
