# Needs make and Python 3.11 to 3.14, no more; `make` alone lists the targets.
# PYTHON=/path/to/python chooses the interpreter of .venv.

py := .venv/bin/python
venv := .venv/complete
toys := checkerboard two_moons spirals swiss_roll eight_gaussians pinwheel
objectives := flow_matching mean_flow
steps := 1,2,4,8,16,32
MNIST ?= configs/mnist.py:small

# compare CONFIG, FOLDER: trains both methods, then measures them by step count.
define compare
$(py) train_flow.py --config=$(1) --workdir=$(2)/flow_matching
$(py) train_meanflow.py --config=$(1) --workdir=$(2)/mean_flow
$(py) eval_fid.py --workdir=$(2)/flow_matching --workdir=$(2)/mean_flow \
    --steps=$(steps) --features=classifier --metrics=fid,nearest --num_samples=2000 --out=$(2)
endef

.PHONY: help demo toys mnist notebooks test oracles topologies lint setup pins clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(venv) ## trains both methods on the embedded digits and compares them by step count
	$(call compare,configs/digits.py,runs/demo)

toys: $(toys:%=%-runs) ## the same on six distributions in the plane, in one figure
	$(py) eval_fid.py --steps=1,32 --num_samples=10000 --out=runs/toys \
	    $(foreach toy,$(toys),$(objectives:%=--workdir=runs/toys/$(toy)/%))

%-runs: $(venv)
	$(py) train_flow.py --config=configs/toy.py:$* --workdir=runs/toys/$*/flow_matching
	$(py) train_meanflow.py --config=configs/toy.py:$* --workdir=runs/toys/$*/mean_flow

mnist: $(venv) ## the same on MNIST, for CPU cores; DATA_DIR=mnist.npz, MNIST=configs/mnist.py on a GPU
	$(call compare,$(MNIST) $(DATA_DIR:%=--data_dir=%),runs/mnist)

notebooks: $(venv) ## runs both notebooks anew, and stores them with what they draw
	$(py) notebooks/execute.py notebooks/tour.ipynb notebooks/sample.ipynb

test: $(venv) ## all tests
	$(py) -m pytest

# On Linux torch comes with 3 GB of CUDA unless pip is told where its CPU builds are.
# torch-fidelity asks for torchvision, of which there is no CPU build everywhere; the tests do without.
oracles: $(venv) ## parity with torch implementations; installs torch and others into .venv
	@$(py) -c "import torch, diffusers" 2>/dev/null || $(py) -m pip install \
	    --disable-pip-version-check -c requirements.txt -e ".[oracles]"
	@$(py) -m pip show -q torch-fidelity 2>/dev/null || $(py) -m pip install \
	    --disable-pip-version-check --no-deps torch-fidelity==0.4.0
	$(py) -m pytest -n 2 tests/oracles

# The compiler for TPUs runs on any x86 machine with Linux; no TPU is needed.
topologies: $(venv) ## what TPUs' compiler makes of steps and kernels; installs 700 MB into .venv
	@$(py) -c "import libtpu" 2>/dev/null || $(py) -m pip install \
	    --disable-pip-version-check -c requirements.txt -e ".[tpu]"
	TOPOLOGIES=1 $(py) -m pytest -n 2 tests/test_compile.py tests/test_attention.py -k "v5e or v6e"

lint: $(venv) ## ruff and mypy
	$(py) -m ruff check .
	$(py) -m ruff format --check .
	$(py) -m mypy

# Extras are lost when .venv is made anew because the pins changed: run this once more.
setup: $(venv) ## makes .venv; with EXTRAS=cuda (tpu, prepare): those packages too
	$(if $(EXTRAS),$(py) -m pip install --disable-pip-version-check \
	    -c requirements.txt -e ".[$(EXTRAS)]")

$(venv): requirements.txt
	@sh scripts/setup.sh

# Keeps the versions that still fit; UPGRADE=--upgrade takes the newest. environment.yml follows by
# hand, and a test compares.
pins: ## writes requirements.txt from pyproject.toml (needs uv)
	uv pip compile --quiet --universal --no-annotate --no-header --python-version 3.11 $(UPGRADE) \
	    --extra test --extra wandb --extra tensorboard --extra diffusers \
	    pyproject.toml --output-file requirements.txt

clean: ## removes .venv and caches; leaves runs/
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
