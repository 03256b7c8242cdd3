# Two commands matter: `make demo` and `make test`. Both set up .venv first; nothing but Python 3.11+, git and make is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Tests run in this many processes, one thread each: libraries that share two cores wait for each other. A file's tests
# stay together, so that what they share is made once.
WORKERS ?= 2

# Inputs that `make fuzz` tries in all; 0 takes each family's own number.
FUZZ_COUNT ?= 0

.PHONY: demo test lint fuzz docs format requirements clean help

help:
	@echo "make demo    images -> projection -> fused ONNX -> answers, and a page that shows it"
	@echo "make test    lint and all tests"
	@echo "make lint    ruff and mypy --strict"
	@echo "make fuzz    damaged and made-up inputs of every kind, counted in docs/fuzzing.md"
	@echo "make docs    the documentation as a site, in build/site"
	@echo "make requirements  requirements.txt anew, with the digests of what a server installs"
	@echo "make format  ruff's formatter and safe fixes"

$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else 'invariclip needs Python 3.11 or newer, this is ' + sys.version.split()[0])"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/invariclip demo --out build/demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# mypy wants one folder named like the package; setup.py maps several folders to it, so link them together.
build/typing: $(VENV)/.installed
	@mkdir -p build/typing/invariclip
	@find build/typing/invariclip -type l -delete
	@ln -sfn $(addprefix $(CURDIR)/,$(wildcard runtime/*) export calibrate bench) build/typing/invariclip/

lint: $(VENV)/.installed build/typing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=build/typing $(BIN)/mypy --cache-dir build/.mypy_cache -p invariclip
	cd build/typing && PYTHONPATH=. $(CURDIR)/$(BIN)/lint-imports --no-cache --no-logo $(CURDIR)/pyproject.toml

# What a server installs, with the digests of all platforms' files
requirements: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	head -3 requirements.txt > build/requirements.txt
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-annotate --no-header --python-version 3.11 \
	  --extra serve --extra sign -c constraints.txt pyproject.toml -o build/hashes.txt
	cat build/requirements.txt build/hashes.txt > requirements.txt

fuzz: $(VENV)/.installed
	cd tests && $(CURDIR)/$(BIN)/python -m fuzz --count $(FUZZ_COUNT) --out $(CURDIR)/docs/fuzzing.md

docs: $(VENV)/.installed build/typing
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build $(VENV)

.PHONY: build/typing
