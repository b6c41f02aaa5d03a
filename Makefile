# `make demo` and `make test` do all the set-up on a fresh machine.
# Python packages go into a virtual environment of the project's own, VENV.

PYTHON ?= python3
VENV ?= .venv
# A Detectron2 wheel, built by following Detectron2's install guide. Without one, the tests that
# need Detectron2 are skipped.
DETECTRON2_WHEEL ?= $(lastword $(sort $(wildcard $(HOME)/wheels/detectron2-*.whl)))

PIP = $(VENV)/bin/pip install --disable-pip-version-check --quiet
RUN = $(VENV)/bin/python
MAKE_SAMPLE = $(RUN) tools/make_sample_data.py --out data/sample
DEMO = work_dirs/demo
DEMO_DETECTION = work_dirs/demo-detection
# tested versions
TESTED = torch==2.11.0 torchvision==0.26.0 mmengine==0.10.7 mmcv-lite==2.1.0 \
	mmsegmentation==1.2.2 "setuptools<82"

.PHONY: demo demo-detection test lint format docs clean

demo: $(VENV)/.demo
	$(MAKE_SAMPLE)
	$(RUN) tools/mmseg_train.py upernet_difffeed_sample.py --work-dir $(DEMO)
	$(RUN) tools/mmseg_visualize.py upernet_difffeed_sample.py \
		"$$(cat $(DEMO)/last_checkpoint)" --out $(DEMO)/predictions.png

demo-detection: $(VENV)/.detectron2
	$(MAKE_SAMPLE)
	$(RUN) tools/train_net.py --config mask_rcnn_gd_sample.yaml OUTPUT_DIR $(DEMO_DETECTION)
	$(RUN) tools/visualize_predictions.py --config mask_rcnn_gd_sample.yaml \
		--out $(DEMO_DETECTION)/predictions.png OUTPUT_DIR $(DEMO_DETECTION)

test: $(VENV)/.dev $(VENV)/.detectron2  # two processes with one thread each
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: $(VENV)/.dev
	$(VENV)/bin/mkdocs build --strict

$(VENV)/.demo: setup.py
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): about 5 GB, a few minutes"
	$(PIP) $(TESTED) -e ".[mmseg,tools]"
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) mmpretrain==1.2.0 -e ".[mmseg,mmpretrain,dev]"
	@touch $@

$(VENV)/.detectron2: $(VENV)/.demo $(DETECTRON2_WHEEL)
	$(if $(DETECTRON2_WHEEL),$(PIP) "$(DETECTRON2_WHEEL)" -e ".[detectron2]",@echo \
		"no Detectron2 wheel found: the detection demo needs one, the tests for it are skipped")
	@touch $@

clean:
	rm -rf work_dirs data/sample site
