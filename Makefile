# Thin targets: everything works from `pip install -e ".[dev]"` too.
PYTHON ?= python3.11
VENV := .venv
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1
unexport PYTHONDONTWRITEBYTECODE  # of 22,000 installed files, those that are imported are compiled, and only once

.PHONY: quickstart test coverage lint docs clean

quickstart: $(STAMP)
	$(VENV)/bin/distill run --config recipes/quickstart.yaml

# the notebooks are tested on the finished quickstart; a finished one is not run again
test: quickstart
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal $(PYTEST_OPTIONS)

coverage: PYTEST_OPTIONS := --cov=distill --cov-report=term
coverage: test

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

docs: $(STAMP)
	$(VENV)/bin/mkdocs build --strict

# torch first: on a machine without a GPU its index offers a CPU build, which the rest then builds on
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --no-compile --disable-pip-version-check torch -c constraints.txt
	$(VENV)/bin/python -m pip install -q --no-compile --disable-pip-version-check -e ".[dev]" -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV)
