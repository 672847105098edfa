# Plain pip and venv underneath. `make demo` and `make test` do all the set-up on a fresh machine.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
NODE_MODULES = tests/javascript/node_modules
MODEL ?= examples/tiny-model/checkpoint
TARGET ?= android-q4
OUT ?= out
WORKERS ?= 2
BUNDLE = $(OUT)/$(subst :,-,$(notdir $(patsubst %/,%,$(MODEL:%/checkpoint=%))))-$(TARGET)

# Test files side by side: exporting is mostly Python, on one core. A worker takes 2 to 4 GB.
PYTEST = $(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile $(PYTEST_OPTIONS)

.PHONY: demo figures test test-heavy lint docs wheel train-tiny clean

# llama.cpp is compiled when it is installed, in some ten minutes: only for the target that it runs.
demo: $(VENV)/.installed $(if $(filter gguf-%,$(TARGET)),$(VENV)/.installed-llamacpp)  ## export MODEL to TARGET, verify it, let it answer, measure it
	$(BIN)/lfm-edge export --target $(TARGET) --model $(MODEL) --output $(BUNDLE) --force
	$(BIN)/lfm-edge verify $(BUNDLE)
	$(BIN)/python examples/python/ask.py $(BUNDLE)
	$(BIN)/lfm-edge bench $(BUNDLE)

figures: $(VENV)/.installed  ## measure MODEL on every target that runs here: a report, and the table in docs/internals/measurements.md
	$(BIN)/python examples/python/figures.py $(MODEL)

test: $(VENV)/.installed-dev $(NODE_MODULES)/.installed  ## the tests, without the heavy ones
	$(PYTEST)

test-heavy: $(VENV)/.installed-dev $(NODE_MODULES)/.installed  ## the heavy ones: every awkward model and every option, exported
	$(PYTEST) -m heavy

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache --no-logo

docs: $(VENV)/.installed-dev  ## the parts of docs/ that are made: the command line from --help, the README's terminal
	PYTHONPATH=. $(BIN)/python docs/command_line.py
	PYTHONPATH=. $(BIN)/python docs/terminal.py

wheel: $(VENV)/.installed-dev  ## the package as a wheel in dist/, and whether it runs from there
	rm -rf dist build/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/python -m pip install --quiet --no-deps --target build/wheel dist/lfm_edge-*.whl
	cd build/wheel && PYTHONPATH=. $(abspath $(BIN))/python -P -m lfm_edge.cli targets
	cd build/wheel && PYTHONPATH=. $(abspath $(BIN))/python -P -c "import lfm_edge, exporters, runtimes, pathlib; \
	    assert all(pathlib.Path.cwd() in pathlib.Path(m.__file__).parents for m in (lfm_edge, exporters, runtimes))"

train-tiny: $(VENV)/.installed-dev  ## train the small model of examples/tiny-model again
	PYTHONPATH=. $(BIN)/python examples/tiny-model/train.py

clean:
	rm -rf $(VENV) $(NODE_MODULES) $(OUT) build *.egg-info

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[all]'
	touch $@

$(VENV)/.installed-llamacpp: $(VENV)/.installed pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[llamacpp]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[all,dev]'
	touch $@

$(NODE_MODULES)/.installed: tests/javascript/package-lock.json | $(VENV)/.installed-dev
	PATH="$(BIN):$$PATH" npm ci --prefix tests/javascript --ignore-scripts --no-audit --no-fund
	touch $@
