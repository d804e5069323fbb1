PYTHON ?= python3
BIN := .venv/bin

TORCHRUN := OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node 2
BASELINES := plain cot no_cot no_thoughts pause pause_loop

.PHONY: env trails train baselines truth beyond test test-first test-second test-clients test-extras check-records release-check quality style clean

env: .venv/installed

# Made anew whenever what it is made from changes.
.venv/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,quality]'
	touch $@

trails: env
	$(BIN)/python recipes/trails/prepare.py --output_dir data/trails
	$(BIN)/python recipes/trails/start_model.py --output_dir data/trails-start

# The main job: the whole curriculum on the embedded data set, one process for each of two cores.
train: trails
	$(TORCHRUN) train.py recipes/trails/coconut.yaml
	$(BIN)/python recipes/trails/show.py --model out/trails-coconut --output out/trails-coconut/board.png

# The same number of steps with the paper's loss, without thoughts, or with thoughts that carry nothing.
baselines: trails
	for mode in $(BASELINES); do $(TORCHRUN) train.py recipes/trails/$$mode.yaml || exit 1; done
	$(BIN)/python recipes/trails/compare.py $(wildcard out/trails-coconut) $(BASELINES:%=out/trails-%) --output out/trails.png

# Do the thoughts matter? Every mode with three seeds, each diagnosed; hours, and goes on where it stopped.
truth: trails
	$(BIN)/python recipes/trails/truth.py

# What lies beyond the trained range, and which setting moves it: harder boards, three seeds for each change; hours.
beyond: env
	$(BIN)/python recipes/trails/beyond.py

# In two halves side by side: alone, most of a test run leaves the second core idle.
test: env
	$(MAKE) --no-print-directory -j2 --output-sync=none test-first test-second

FIRST_TESTS := $(sort $(wildcard tests/test_[a-k]*.py))
test-first: PYTEST_FILES := $(FIRST_TESTS)
test-second: PYTEST_FILES := $(filter-out $(FIRST_TESTS),$(sort $(wildcard tests/test_*.py)))
test-first test-second: env
	OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest $(PYTEST_FILES)

# Other people's programs on the trained checkpoint of the tests, in an environment of their own.
.venv-clients/installed: setup.cfg pyproject.toml constraints-clients.txt
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/pip install --quiet --disable-pip-version-check -c constraints-clients.txt -e '.[clients]'
	touch $@

test-clients: .venv-clients/installed
	PATH="$(CURDIR)/.venv-clients/bin:$$PATH" .venv-clients/bin/python -m pytest tests/clients tests/test_clients.py

# The optimizers, trackers and 4 bits of other packages, in an environment of their own.
.venv-extras/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-extras
	.venv-extras/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,optimizers,qlora,trackers]'
	touch $@

test-extras: .venv-extras/installed
	OMP_NUM_THREADS=1 PATH="$(CURDIR)/.venv-extras/bin:$$PATH" .venv-extras/bin/python -m pytest tests/test_optimizers.py tests/test_trackers.py $(wildcard tests/test_lora*.py tests/test_folders.py tests/test_qlora.py)

# Memory of two ranks with 100,000 records, the time to start; that the benchmark of pictures runs.
check-records: env
	$(BIN)/python benchmarks/records.py
	$(BIN)/python benchmarks/pictures.py --quick

# What needs longer than the gate, or environments of its own; the table goes into docs/release_check.md.
release-check: env
	$(BIN)/python tests/release_check.py

quality: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p .mypy_cache && ln -sfn "$(CURDIR)" .mypy_cache/multicoco
	MYPYPATH=.mypy_cache $(BIN)/mypy -p multicoco

style: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-clients .venv-extras .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
