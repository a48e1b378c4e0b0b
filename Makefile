# make run, make test: each sets up what it needs, on a fresh machine or again on a used one.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test test-long test-cuda lint clean

run: $(VENV)/run.done
	$(BIN)/python ppo.py
	@echo "For these commands: source $(BIN)/activate"

test: $(VENV)/dev.done
	$(BIN)/python -m pytest -n auto

test-long: $(VENV)/dev.done
	$(BIN)/python -m pytest -n auto -m "long or not long"

# On a machine with a GPU; elsewhere they are skipped.
test-cuda: $(VENV)/dev.done
	STRIDE_TEST_CUDA=1 $(BIN)/python -m pytest -n 4 tests/test_cuda.py

lint: $(VENV)/dev.done
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and \
	  "Stride needs Python 3.11 to 3.13; for another one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/run.done: requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/dev.done: requirements.txt requirements-dev.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@ $(VENV)/run.done

clean:
	rm -rf $(VENV)
