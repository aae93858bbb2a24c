# Everything runs from here: a fresh machine needs Python 3.11 or newer, git and make.
PYTHON ?= python3
UV := .tools/bin/uv
RUN := .venv/bin/python
export UV_HTTP_TIMEOUT ?= 300
export UV_PYTHON_DOWNLOADS := never
COMPILE := pip compile --quiet --universal --generate-hashes --python-version 3.11 --extra dev --extra harmony --extra server \
	--custom-compile-command "make lock" pyproject.toml

.PHONY: setup demo online-demo notebooks test test-fast test-long check lock format clean

setup: .venv/.synced  ## Make .venv from the lock

$(UV):
	$(PYTHON) -m venv .tools
	.tools/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9

.venv/.synced: requirements.lock pyproject.toml | $(UV)
	test -x $(RUN) || $(UV) venv --quiet --python $(PYTHON) .venv
	$(UV) pip sync --quiet --compile-bytecode --python $(RUN) --require-hashes requirements.lock
	$(UV) pip install --quiet --python $(RUN) --no-deps --no-build-isolation --editable .
	touch $@

demo: setup  ## Simulate a bucket, serve it by S3, ingest, adapt, compare
	$(RUN) jobs/demo.py

online-demo: setup  ## Plates arrive one by one: watched, adapted to, predicted; killed in the middle, and still the same
	$(RUN) jobs/online_demo.py

notebooks: setup  ## Run the notebooks again and keep their outputs
	$(RUN) notebooks/run.py

test: setup  ## Every test but those that take minutes each
	$(RUN) -m pytest -m "not long" --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 20

test-long: setup  ## The tests that take longest: sweeps, watchers, submitted jobs, notebooks, nodes that die, jobs that are killed
	$(RUN) -m pytest -m long --timeout 3600

test-fast: setup  ## Tests that take seconds
	$(RUN) -m pytest -m "not slow and not long"

check: setup  ## Lint, format, types, and whether the lock matches pyproject.toml
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	cp requirements.lock build.lock && $(UV) $(COMPILE) --output-file build.lock && cmp build.lock requirements.lock; \
		status=$$?; rm -f build.lock; \
		test $$status = 0 || { echo "requirements.lock does not match pyproject.toml: run make lock"; exit 1; }

lock: | $(UV)  ## Resolve the dependencies anew (add UPGRADE=--upgrade for newer releases)
	$(UV) $(COMPILE) $(UPGRADE) --output-file requirements.lock

format: setup  ## Format and mend what ruff can mend
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:  ## Delete what the demos and the notebooks made
	rm -rf demo online-demo notebooks/work
