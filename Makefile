# Everything runs in a virtual environment that the first command makes. `make help` lists the commands.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.DEFAULT_GOAL := help
.PHONY: help demo test faults up down check fix bench lock clean

help: ## List these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

demo: $(INSTALLED) ## Tell the product's story on a real API server, then stop everything
	@$(BIN)/python -m deploy.local demo

test: $(INSTALLED) ## Run every test (T="-k word" narrows it down)
	@$(BIN)/python -m deploy.local.build >/dev/null
	@$(BIN)/python -m pytest -n 3 --dist loadfile $(T)

faults: $(INSTALLED) ## Break everything that can break around the operator, at every call, and print a table (10 minutes)
	@$(BIN)/python -m deploy.local.build >/dev/null
	@FAULTS=all $(BIN)/python -m pytest tests/faults -n 0 $(T)

up: $(INSTALLED) ## Start everything in the background; TWILIO_URL=http://... or TWILIO=real, WEBHOOK_URL_TEMPLATE=..., DATA=dir
	@$(BIN)/python -m deploy.local up \
		$(if $(TWILIO_URL),--twilio-url '$(TWILIO_URL)') $(if $(TWILIO),--twilio '$(TWILIO)') \
		$(if $(WEBHOOK_URL_TEMPLATE),--webhook-url-template '$(WEBHOOK_URL_TEMPLATE)') $(if $(DATA),--etcd-data '$(DATA)')

down: $(INSTALLED) ## Stop what `make up` started
	@$(BIN)/python -m deploy.local down

check: $(INSTALLED) ## Lint, types, layers and go vet; writes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m deploy.local.build --vet

fix: $(INSTALLED) ## Mend what lint and format can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED) ## Measure speed, drift checks, fairness and the REST API (B="--help" for what can be set)
	@$(BIN)/python -m deploy.local.build >/dev/null
	@$(BIN)/python -m tests.bench $(B)

lock: $(INSTALLED) ## Make the lock files anew from pyproject.toml
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --all-extras \
		--no-emit-index-url --custom-compile-command 'make lock' --output-file requirements.lock pyproject.toml

clean: down ## Remove what was installed and left here (not the cached control plane)
	rm -rf .venv .local .mypy_cache .ruff_cache .pytest_cache

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, and this is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12 ...")'
	@echo "Installing into .venv (a minute the first time) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --no-index -e .
	@$(BIN)/python -m compileall -q -j 0 .venv/lib >/dev/null || true  # where bytecode is not written by itself, starts take seconds
	@touch $@
