# Each verb is the only command needed on a fresh clone: it makes .venv and installs the lock file first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM = false
# Tests start hundreds of processes, each of which would compile its imports anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo docs test test-docs test-wheel test-ranks test-remote test-cluster test-doctor test-fast check format lock clean

install: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python launch/demo.py

# The pages of docs/ as a web site in build/docs. A broken link is an error.
docs: $(STAMP)
	$(BIN)/mkdocs build --quiet --strict

# Two test processes of one thread each suit two cores; JOBS=0 runs them in this process.
JOBS ?= 2

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --ignore=tests/dist --ignore=tests/docs -n $(JOBS) --dist worksteal \
		-m "not remote and not slurm and not multinode"

# The commands, the Python code and the notebooks of the documents, as a reader would run them.
test-docs: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/docs

# The built wheel in a fresh environment, used in another folder.
test-wheel: $(STAMP)
	bash tests/wheel/check.sh $(BIN)/python

# Training on several ranks of this machine: equal to one rank, sharded or not, stopped and resumed.
test-ranks: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/dist -n $(JOBS) --dist worksteal

# Runs that are killed, and servers that fail, on nginx and an S3-compatible server that the tests start.
test-remote: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/remote -n $(JOBS) --dist worksteal -m remote

# A SLURM cluster and hosts of network namespaces on this machine: needs root; installs Debian's packages of SLURM. One test
# after the other: several of them keep all cores busy with the start of ranks, and wait for moments.
test-cluster: $(STAMP)
	bash tests/cluster/install.sh
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/cluster --ignore-glob='*/test_doctor_*' --ignore-glob='*/test_traffic*' --durations=25 \
		-m "slurm or multinode"

# The doctor on ranks and hosts with faults, and what ranks send to each other.
test-doctor: $(STAMP)
	bash tests/cluster/install.sh
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/doctor tests/cluster/test_doctor_*.py tests/cluster/test_traffic.py \
		tests/benchmark/test_benchmark_scale.py -n $(JOBS) --dist worksteal -m multinode

test-fast: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --ignore=tests/docs -n $(JOBS) --dist worksteal -m "not slow and not photos and not remote and not slurm and not multinode"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Exact versions, no index address: works with whatever index pip is set up for. Versions in the file stay; delete it to upgrade.
lock:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --extra cpu --extra s3 --extra parquet --extra tiff --extra export --extra docs --extra dev --universal --python-version 3.11 \
		--no-header --no-annotate -o requirements.lock

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
