# Everything runs in a virtual environment inside the checkout. Another Python, or other versions:
# make PYTHON=python3.13 CONSTRAINTS=constraints-newest.txt ... Each combination has an environment of its own.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
# Processes that run tests at a time, with one thread each: more than two cores, because some tests only wait.
JOBS ?= 4
# .venv; .venv-newest-python3.13 for the example above.
VENV := .venv$(patsubst constraints%.txt,%,$(notdir $(CONSTRAINTS)))$(patsubst -python3,,-$(notdir $(PYTHON)))
RUN := $(VENV)/bin/python
# What is not compiled at the installation, but at the first import, if ever.
RARELY_IMPORTED := /tests?/|transformers/models/|/(pip|setuptools|pkg_resources|sklearn|pandas|narwhals|pygments|fontTools|libcst|mypyc?|onnxscript|mlflow|wandb|databricks|opentelemetry|fastapi|git)/
# Tests start many programs, which start sooner from cached bytecode.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: venv quickstart check test tests lint types format docs gpu-check clean

venv: $(VENV)/.installed

$(VENV)/.installed: setup.py $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --no-compile --constraint $(CONSTRAINTS) --editable ".[dev,dali,docs,export,hf,loggers]"
	-$(RUN) -m compileall -qq -j 0 -x '$(RARELY_IMPORTED)' $(VENV)/lib  # on all cores; pip would use one
	touch $@

quickstart: venv
	$(RUN) main.py --fname configs/quickstart.yaml
	$(RUN) -m dmtjepa.evaluation runs/quickstart

# Before every commit: style, types and the fast tests. 90 seconds on two cores.
check: JOBS = 2
check: lint types
	$(PYTEST) -m "not slow" -q

# Everything, as CI runs it.
test: lint
	$(MAKE) --no-print-directory --jobs 2 types tests

tests: venv
	$(PYTEST)

lint: venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# The last NumPy for Python 3.10 has types that ask for arguments at each ndarray.
types: venv
	$(RUN) -m mypy $(if $(findstring oldest,$(CONSTRAINTS)),--disable-error-code type-arg)

format: venv
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# The documentation as a site, in build/site; a broken link is an error.
docs: venv
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet --strict

# On a machine with a CUDA device: correctness first, then every benchmark, in under 10 minutes.
# OFFICIAL=checkout of the official code compares with it (PUBLISHED is the old name); IMAGES=folder of photographs measures the loaders, too.
OFFICIAL ?= $(PUBLISHED)
gpu-check: venv
	$(RUN) -m benchmarks.gpu_check --out benchmarks/results $(if $(OFFICIAL),--official $(OFFICIAL)) \
		$(if $(IMAGES),--images $(IMAGES))

clean:
	rm -rf .venv .venv-* build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
