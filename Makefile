PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/quickstart

.PHONY: quickstart test test-core test-oldest clean

quickstart: $(VENV)/installed
	$(VENV)/bin/nla quickstart --workdir $(WORKDIR)

test: $(VENV)/installed-test
	$(VENV)/bin/ruff check -q . && $(VENV)/bin/ruff format -q --check .
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile tests

test-core: $(VENV)/installed-core  # a quick test of each file; where there is no torch, of those that need none
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile --core tests

test-oldest:  # the whole suite on the oldest releases that setup.py admits, in an environment of its own
	@$(MAKE) VENV=.venv-oldest OLDEST=1 test

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "nla_jax needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python setup.py
	$(VENV)/bin/python -m pip install -q -e .
	@touch $@

$(VENV)/installed-test: $(VENV)/bin/python setup.py
	sed -nE 's/^ *"([A-Za-z0-9_.-]+)(\[[a-z,]+\])?>=([0-9.]+)".*/\1==\3/p' setup.py > $(VENV)/oldest.txt
	$(VENV)/bin/python -m pip install -q -e '.[test]' $(if $(OLDEST),-c $(VENV)/oldest.txt)
	@touch $@ $(VENV)/installed $(VENV)/installed-core

$(VENV)/installed-core: $(VENV)/bin/python setup.py
	$(VENV)/bin/python -m pip install -q -e '.[test-core]'
	@touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV)
