# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Python packages go into a virtual environment of the project's own, VENV.

PYTHON ?= python3
VENV ?= .venv
# A Detectron2 wheel to test against, built by Detectron2's own install guide; without one the
# tests that need Detectron2 skip.
DETECTRON2_WHEEL ?= $(lastword $(sort $(wildcard $(HOME)/wheels/detectron2-*.whl)))

PIP = $(VENV)/bin/pip install --disable-pip-version-check --quiet
RUN = $(VENV)/bin/python
DEMO = work_dirs/demo
DEMO_DETECTION = work_dirs/demo-detection
# the versions that everything was tested with
TESTED = torch==2.11.0 torchvision==0.26.0 mmengine==0.10.7 mmcv-lite==2.1.0 \
	mmsegmentation==1.2.2 mmpretrain==1.2.0 "setuptools<82"

.PHONY: demo demo-detection test lint format clean

demo: $(VENV)/.installed
	$(RUN) tools/make_sample_data.py --out data/sample
	$(RUN) tools/mmseg_train.py upernet_difffeed_sample.py --work-dir $(DEMO)
	$(RUN) tools/mmseg_visualize.py upernet_difffeed_sample.py \
		"$$(cat $(DEMO)/last_checkpoint)" --out $(DEMO)/predictions.png

demo-detection: $(VENV)/.installed-detectron2
	$(RUN) tools/make_sample_data.py --out data/sample
	$(RUN) tools/train_net.py --config mask_rcnn_gd_sample.yaml OUTPUT_DIR $(DEMO_DETECTION)
	$(RUN) tools/visualize_predictions.py --config mask_rcnn_gd_sample.yaml \
		--out $(DEMO_DETECTION)/predictions.png OUTPUT_DIR $(DEMO_DETECTION)

test: $(VENV)/.installed-detectron2  # two processes, a thread each, in tests/conftest.py's order
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(VENV)/.installed: setup.py
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): some 5 GB, a few minutes"
	$(PIP) $(TESTED)
	$(PIP) -e ".[mmseg,mmpretrain,dev]"
	@touch $@

$(VENV)/.installed-detectron2: $(VENV)/.installed $(DETECTRON2_WHEEL)
	$(if $(DETECTRON2_WHEEL),$(PIP) "$(DETECTRON2_WHEEL)" -e ".[detectron2]",@echo \
		"no Detectron2 wheel: what needs Detectron2 will say so, its tests will skip")
	@touch $@

clean:
	rm -rf work_dirs data/sample
