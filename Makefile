# Needs Python 3.11 or newer with venv and pip, nothing else. The first call makes .venv; later ones use it.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
SUDO := $(if $(filter-out 0,$(shell id -u)),sudo)

.PHONY: demo app app-picture test test-oldest test-gpu gpu test-browser test-web chromium node test-slow test-pages check docs dist bench bench-compiled \
    bench-sweep bench-batch bench-dense bench-frontier train-smoke segmentation-demo detection-demo data-fashion-mnist
.DELETE_ON_ERROR:

demo: $(VENV)/installed  ## train vitae-nano on real images and use it
	$(RUN) scripts/demo.py

app: $(VENV)/installed  ## a page for the browser: what does a model make of my pictures, and what does it look at?
	$(RUN) -m vitae_hf app

app-picture: $(VENV)/installed chromium  ## photograph that page, with what `make demo` trained
	$(RUN) scripts/photograph_app.py --output results/app.png

test: $(VENV)/installed  ## the default suite, in two processes
	$(RUN) -m pytest -n 2 --dist loadfile

OLDEST := .venv-oldest
test-oldest:  ## the same on the lowest versions that setup.cfg names, the exports first, on the transformers that they need
	$(PYTHON) -m venv $(OLDEST)
	$(PYTHON) .ci/lowest_versions.py --extras > $(OLDEST)/exports.txt
	$(OLDEST)/bin/python -m pip install --editable ".[test]" --constraint $(OLDEST)/exports.txt
	$(OLDEST)/bin/python -m pytest tests/deployment/test_exporting.py
	$(PYTHON) .ci/lowest_versions.py > $(OLDEST)/package.txt
	$(OLDEST)/bin/python -m pip install --editable . --constraint $(OLDEST)/package.txt
	$(OLDEST)/bin/python -m pytest -n 2 --dist loadfile tests

# Machines with a GPU come with a torch of their own, which $(PYTHON) has: nothing is installed.
gpu:  ## all that a GPU must show, under nine minutes
	PYTHONPATH=src $(PYTHON) scripts/measure_gpu.py --output results/gpu

test-gpu:  ## the tests that need a GPU
	PYTHONPATH=src CUDA_VISIBLE_DEVICES=$(or $(CUDA_VISIBLE_DEVICES),0) $(PYTHON) -m pytest --confcutdir tests -m gpu tests/family/test_gpu.py tests/training/test_steps.py

test-browser: $(VENV)/installed chromium  ## drive the web page in Chromium
	$(RUN) -m pytest -m browser tests/web/test_browser.py

JAVASCRIPT := tests/javascript/node_modules
test-web: $(VENV)/installed chromium node $(JAVASCRIPT)/installed  ## exported models in Node and in Chromium
	$(RUN) -m pytest -m browser tests/deployment/test_page.py

# Without install scripts, which would download what no test uses.
$(JAVASCRIPT)/installed: tests/javascript/package-lock.json
	cd tests/javascript && npm ci --ignore-scripts
	touch $@

node:  ## Debian's, unless it is here
	command -v node && command -v npm || \
	    { $(SUDO) apt-get update && $(SUDO) apt-get install --yes --no-install-recommends nodejs npm; }

chromium:  ## Debian's, and its driver, unless they are here
	command -v chromium && command -v chromedriver || \
	    { $(SUDO) apt-get update && $(SUDO) apt-get install --yes --no-install-recommends chromium chromium-driver; }

test-slow: $(VENV)/installed  ## checks that take minutes
	$(RUN) -m pytest -m slow -n 2 --dist worksteal

test-pages: $(VENV)/installed  ## the documentation's commands in the shell at full length, about ten minutes
	$(RUN) -m pytest --whole README.md docs

check: $(VENV)/installed  ## style, types, and which room imports which
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports setup.cfg

docs: $(VENV)/installed  ## the documentation for the browser, build/docs/index.html; fetches nothing, and a warning is an error
	$(RUN) -m sphinx --nitpicky --fail-on-warning --keep-going docs build/docs

dist: $(VENV)/installed  ## wheel and sdist, checked, and tried in a clean environment of each Python that is here
	rm -rf dist
	$(RUN) -m build
	$(RUN) -m twine check --strict dist/*
	$(RUN) .ci/try_wheel.py dist/*.whl

BENCH := $(RUN) -m vitae_hf benchmark --threads 2
bench: $(VENV)/installed  ## speed and memory against ViT-S and Swin-T, about twelve minutes
	$(BENCH) --networks vitae-t vitae-s vitaev2-s vit-s swin-t --dtype float32 bfloat16 --prepare both --rounds 21 --output results/bench_cpu

bench-compiled: $(VENV)/installed  ## the same, compiled, ViT-S too; needs a C++ compiler
	$(BENCH) --networks vitae-t vitae-s vitaev2-s vit-s --dtype float32 bfloat16 --prepare yes --compile yes --skip_memory --output results/bench_compiled_cpu

bench-sweep: $(VENV)/installed  ## how the cost grows with the resolution
	$(BENCH) --networks vitae-t vitae-s vitaev2-s vit-s swin-t --size 224 --size 448 --size 896 --batch_size 1 --prepare yes --output results/sweep_cpu

bench-batch: $(VENV)/installed  ## how the cost grows with the batch
	$(BENCH) --networks vitae-t vitae-s vitaev2-s vit-s swin-t --batch_size 1 4 16 --prepare yes --output results/batch_cpu

bench-dense: $(VENV)/installed  ## ViTAEv2 and Swin-T at the sizes of classification and detection
	$(BENCH) --networks vitaev2-s swin-t --reference swin-t --size 224 --size 800 1216 --batch_size 1 --mode inference training --output results/dense_cpu

bench-frontier: $(VENV)/installed  ## printed accuracy over measured time, ours and others', in torch, ONNX Runtime and OpenVINO
	$(RUN) scripts/measure_frontier.py --output results/frontier_cpu

SMOKE := outputs/smoke
train-smoke: $(VENV)/installed  ## the whole path in a minute: pretrain by recipe and from a stream, fine-tune, evaluate
	rm -rf $(SMOKE)
	$(RUN) -m vitae_hf train --config vitae-t --preset vitae-nano --dataset examples/fashion_mnist_mini --streaming \
	    --image_size 64 --max_steps 20 --warmup_steps 5 --dataloader_num_workers 1 --per_device_train_batch_size 32 \
	    --save_strategy steps --eval_strategy no --save_steps 10 --ema_warmup --output_dir $(SMOKE)/pretrained
	$(RUN) -m vitae_hf train --model_name_or_path $(SMOKE)/pretrained/ema --dataset examples/fashion_mnist_mini \
	    --train_share 0.1 --image_size 96 --layer_decay 0.8 --repeated_augmentation 2 --gradient_accumulation_steps 2 \
	    --max_steps 5 --learning_rate 1e-3 --save_strategy no --output_dir $(SMOKE)/fine-tuned
	$(RUN) -m vitae_hf evaluate --model_name_or_path $(SMOKE)/fine-tuned --dataset examples/fashion_mnist_mini \
	    --output $(SMOKE)/evaluation

SCENES := outputs/garment-scenes
segmentation-demo: $(VENV)/installed  ## train UperNet on vitae-nano to find the garments in rendered scenes, some minutes
	$(RUN) -m vitae_hf segment --config upernet-garment-scenes --output_dir $(SCENES)

BOXES := outputs/garment-boxes
detection-demo: $(VENV)/installed  ## train RT-DETR on vitae-nano to find the garments in rendered scenes, a quarter of an hour
	$(RUN) -m vitae_hf detect --config rt-detr-garment-scenes --output_dir $(BOXES)

data-fashion-mnist: $(VENV)/installed  ## all 70,000 images as parquet, from Debian's package; elsewhere give scripts the Hub name
	rm -rf data/debian && mkdir -p data/debian
	cd data/debian && apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb .
	$(RUN) scripts/build_fashion_mnist.py data/debian/usr/share/datasets/fashion-mnist --output data/fashion_mnist

$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'vitae-hf needs Python 3.11 or newer')"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --editable ".[test,docs,dist]"
	touch $@
