PYTHON ?= python3
VENV := .venv
WORKDIR ?= runs/quickstart

.PHONY: quickstart test clean

quickstart: $(VENV)/installed
	$(VENV)/bin/nla quickstart --workdir $(WORKDIR)

test: $(VENV)/installed-test
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile tests

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "nla_jax needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python setup.py
	$(VENV)/bin/python -m pip install -q -e .
	@touch $@

$(VENV)/installed-test: $(VENV)/bin/python setup.py
	$(VENV)/bin/python -m pip install -q -e '.[test]'
	@touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV)
