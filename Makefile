# Two commands: `make demo` runs the main job on real input, `make test` runs the tests.
# Both build .venv from the python3 found here and install what they need into it.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test check accuracy aot zoo

demo: $(READY)
	$(BIN)/a2ats demo

# In as many processes as there are cores, four at most; a file stays in one, whose compiled programs its tests share.
test: $(READY)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# Lint, format and types, as CI runs them.
check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyrefly check

# Compile every kernel for TPUs and an H100 on a machine that has neither. Builds .venv-aot (1.6 GB) with their compilers.
aot: .venv-aot/.ready
	.venv-aot/bin/python tests/aot/tpu_aot.py
	.venv-aot/bin/python tests/aot/tpu_aot.py --schedules
	.venv-aot/bin/python tests/aot/tpu_mesh_aot.py
	.venv-aot/bin/python tests/aot/gpu_aot.py

.venv-aot/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-aot
	.venv-aot/bin/python -m pip install --quiet --editable '.[aot]'
	@touch $@

# Models of other packages under the methods. Builds .venv-zoo (3.3 GB) with them; uv, since pip takes far longer to resolve them.
# In two processes: gemma replaces a function of flax.linen, and transformers fails where it has.
zoo: .venv-zoo/.ready
	.venv-zoo/bin/python -m pytest tests/adapters -k "not transformers"
	.venv-zoo/bin/python -m pytest tests/adapters -k transformers

.venv-zoo/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-zoo
	.venv-zoo/bin/python -m pip install --quiet uv
	.venv-zoo/bin/uv pip install --quiet --python .venv-zoo/bin/python --editable '.[tunix,gemma,transformers]' \
	  pytest pytest-timeout hypothesis beartype
	@touch $@

# The tables of docs/accuracy.md (hours on two cores; resumes where it was stopped).
accuracy: $(READY)
	test -f runs/novels.txt || { mkdir -p runs && $(BIN)/python docs/novels.py runs/novels.txt; }
	$(BIN)/python docs/accuracy.py runs/accuracy --novels runs/novels.txt

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 12) else "python3 here is %d.%d: expected 3.12 or newer, set PYTHON=..." % v)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@
