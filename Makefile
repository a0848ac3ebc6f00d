# Each target does all of its own set-up on a machine that has python3.11 (with venv) and make.
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test parity lint clean

demo: $(STAMP)
	@echo "== reconstruct a real clip and sample a prompt on both backends, into demo/"
	$(BIN)/osp demo --output demo

test: $(STAMP)
	@echo "== tests: golden numbers, torch against MindSpore, bad input"
	$(BIN)/python -m pytest

parity: $(STAMP)
	@echo "== quick parity suite: every layer of torch against MindSpore"
	$(BIN)/osp parity

lint: $(STAMP)
	$(BIN)/ruff check .

$(STAMP): pyproject.toml constraints.txt
	@echo "== environment: $(VENV) with the CPU builds of both frameworks (about 4 GB, a few minutes, once)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[torch,mindspore,dev]"
	@touch $(STAMP)

clean:
	rm -rf $(VENV) demo
