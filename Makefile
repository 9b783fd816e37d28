# Needs Python 3.11 or newer with venv and pip, nothing else. The first call makes .venv; later ones use it.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-slow check data-fashion-mnist
.DELETE_ON_ERROR:

demo: $(VENV)/installed  ## train vitae-nano on real images and use it
	$(RUN) scripts/demo.py

test: $(VENV)/installed  ## the default suite
	$(RUN) -m pytest

test-slow: $(VENV)/installed  ## checks that take minutes
	$(RUN) -m pytest -m slow

check: $(VENV)/installed  ## style
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

data-fashion-mnist: $(VENV)/installed  ## all 70,000 images as parquet, from Debian's package; elsewhere give scripts the Hub name
	rm -rf data/debian && mkdir -p data/debian
	cd data/debian && apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb .
	$(RUN) scripts/build_fashion_mnist.py data/debian/usr/share/datasets/fashion-mnist --output data/fashion_mnist

$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'vitae-hf needs Python 3.11 or newer')"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --editable ".[test]"
	touch $@
