# make demo: draw the shapes world, train three stages on it, score each, ask the last one something
# make test: everything the suite checks, offline once the packages are installed
# make bench: side by side with transformers on this machine
# make gpu-check: kernels, compiled blocks and the three real stages at full size on this machine's GPU, with the torch of
#                 its own Python (PYTHON=..), which must have pytest too
# make browser-check: the page of sample.py --serve in a headless chromium, which the machine must have with its driver
PYTHON ?= python3
BIN := .venv/bin
DEMO_DATA := data/shapes,data/clocks,data/shapes_text,data/shapes_many,data/clips,data/long_clips

demo: .venv/run
	$(BIN)/python prepare/shapes.py
	$(BIN)/python train.py config/demo_stage1.py
	$(BIN)/python train.py config/demo_stage2.py
	$(BIN)/python train.py config/demo_stage3.py
	$(BIN)/python eval.py --checkpoint=out/demo_stage1,out/demo_stage2,out/demo_stage3 --data=$(DEMO_DATA)
	$(BIN)/python sample.py --checkpoint=out/demo_stage3 --image=data/shapes/media/validation-000000.png --prompt="Point to every shape."

test: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

bench: .venv/test
	$(BIN)/python bench.py --against=transformers

gpu-check:
	$(PYTHON) -m pytest -s tests/gpu.py
	for stage in 1 2 3; do $(PYTHON) bench.py --step=config/stage$$stage.py || exit; done

browser-check: .venv/test
	$(BIN)/python -m pytest -p no:xdist tests/browser.py

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt
	touch $@

.venv/test: requirements-test.txt .venv/run
	$(BIN)/pip install -q -r requirements-test.txt
	$(BIN)/pip install -q --no-deps --upgrade --target .venv/torchvision torchvision==0.28.0
	touch $@

.PHONY: demo test bench gpu-check browser-check
