# make demo: eight minutes on two cores: installs, draws, trains a model that sees, scores it, asks it something
# make stages: the same world whole, with clocks, text, several pictures and videos: three stages from nothing, each scored
# make test: everything the suite checks, offline once the packages are installed
# make quick: the tests one runs while editing, under 20 seconds
# make test-oldest: model, training and parallel tests with torch 2.11, the oldest that works, in an environment of its own
# make bench: side by side with transformers on this machine
# make gpu-check: right results and figures of this machine's GPU in eight minutes (SECONDS=..), with the torch of its
#                 own Python (PYTHON=..); a line of JSON a finding. Needs neither pytest nor PyAV
# make browser-check: the page of sample.py --serve in a headless chromium, which the machine must have with its driver
PYTHON ?= python3
BIN := .venv/bin
SECONDS ?= 480
SEEN_NEVER := data/demo/shapes/media/validation-000006.png
DEMO_DATA := data/shapes,data/clocks,data/shapes_text,data/shapes_many,data/clips,data/long_clips

demo:
	@echo "About eight minutes on two cores: installing, drawing pictures (1), a tower that sees (2.5), a model that answers (4), scores."
	@$(MAKE) --no-print-directory .venv/run
	$(BIN)/python prepare/shapes.py --out=data/demo --num=24000 --num_clocks=0 --num_text=0 --num_clips=0 --num_validation=300
	$(BIN)/python prepare/tower.py config/demo.py
	$(BIN)/python train.py config/demo.py
	$(BIN)/python eval.py --checkpoint=out/demo --data=data/demo/shapes
	$(BIN)/python sample.py --checkpoint=out/demo --image=$(SEEN_NEVER) --prompt="What do you see?"
	$(BIN)/python sample.py --checkpoint=out/demo --image=$(SEEN_NEVER) --prompt="Point to every shape." --out_dir=out/demo
	@echo
	@echo "out/demo is the model. It opens in transformers, too, and knows the questions of its world (python data.py config/demo.py)."
	@echo "  out/demo/learning.html               how it learned to see"
	@echo "  out/demo/step*/eval/report.html      its answers about pictures that it had never seen"
	@echo "  out/demo/validation-000006.points.png   the points just given, drawn"
	@echo "Three things to try next:"
	@echo "  .venv/bin/python sample.py --checkpoint=out/demo --chat=True --image=$(SEEN_NEVER)     ask it"
	@echo "  .venv/bin/python sample.py --checkpoint=out/demo --serve=8000      open its page in a browser"
	@echo "  make stages      clocks, text, several pictures and videos: three stages from nothing"

stages: .venv/run
	$(BIN)/python prepare/shapes.py
	test -d out/demo_tower || $(BIN)/python prepare/tower.py config/demo_stage1.py
	for stage in 1 2 3; do $(BIN)/python train.py config/demo_stage$$stage.py || exit 1; done
	$(BIN)/python eval.py --checkpoint=out/demo_stage1,out/demo_stage2,out/demo_stage3 --data=$(DEMO_DATA)
	$(BIN)/python sample.py --checkpoint=out/demo_stage3 --image=data/shapes/media/validation-000000.png --prompt="Point to every shape."

test: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

bench: .venv/test
	$(BIN)/python bench.py --against=transformers

gpu-check:
	$(PYTHON) tests/gpu.py --seconds=$$(($(SECONDS) * 3 / 10)); right=$$?; \
	$(PYTHON) bench.py --gpu --seconds=$$(($(SECONDS) * 7 / 10)) && exit $$right

browser-check: .venv/test
	$(BIN)/python -m pytest -p no:xdist tests/browser.py

quick: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m quick

test-oldest: .venv/oldest/done
	OMP_NUM_THREADS=1 .venv/oldest/bin/python -m pytest -n 2 --dist worksteal tests/test_cuda.py tests/test_model.py \
		tests/test_parallel.py tests/test_train.py

.venv/oldest/done: requirements.txt requirements-test.txt
	$(PYTHON) -m venv .venv/oldest
	grep -hv '^torch==\|^-r\|^ruff' requirements.txt requirements-test.txt > .venv/oldest/requirements.txt
	.venv/oldest/bin/pip install -q torch==2.11.0 -r .venv/oldest/requirements.txt
	touch $@

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt
	touch $@

.venv/test: requirements-test.txt .venv/run
	$(BIN)/pip install -q -r requirements-test.txt
	$(BIN)/pip install -q --no-deps --upgrade --target .venv/torchvision torchvision==0.28.0
	touch $@

.PHONY: demo stages test quick test-oldest bench gpu-check browser-check
