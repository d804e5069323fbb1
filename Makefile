PYTHON ?= python3
BIN := .venv/bin

.PHONY: env test quality style clean

env: .venv/installed

# Made anew whenever what it is made from changes.
.venv/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,quality]'
	touch $@

test: env
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest

quality: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis *.egg-info
