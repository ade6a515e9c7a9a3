# Everything runs in a virtual environment inside the checkout. Another Python: make PYTHON=python3.12 ...
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: venv quickstart test lint gpu-check clean

venv: $(VENV)/.installed

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable ".[dev,dali,export]"
	touch $@

quickstart: venv
	$(RUN) main.py --fname configs/quickstart.yaml
	$(RUN) -m dmtjepa.evaluation runs/quickstart

test: venv lint
	$(RUN) -m pytest

lint: venv
	$(VENV)/bin/ruff check .

# On a machine with a CUDA device: correctness first, then every benchmark, in under 10 minutes.
# PUBLISHED=checkout of the published code compares with it; IMAGES=folder of photographs measures the loaders, too.
gpu-check: venv
	$(RUN) -m benchmarks.gpu_check --out benchmarks/results $(if $(PUBLISHED),--published $(PUBLISHED)) \
		$(if $(IMAGES),--images $(IMAGES))

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
