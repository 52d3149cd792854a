# Commands for people and CI. They run in .venv, which the first of them creates. `make help` lists them.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
LOCK := $(BIN)/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-emit-index-url \
	--custom-compile-command 'make lock' $(if $(UPGRADE),--upgrade)

BUILDER ?= $(firstword $(foreach each,docker buildah podman,$(if $(shell command -v $(each)),$(each))))
IMAGE ?= sms-channel-operator:$(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

.DEFAULT_GOAL := help
.PHONY: help demo test faults up down kind-up kind-down kind-test image sbom check fix manifests chart monitoring bench docs picture lock clean

help: ## List these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

demo: $(INSTALLED) ## Run the product's story on a real API server, checking each step, then stop everything
	@$(BIN)/python -m deploy.local demo

test: $(INSTALLED) ## Run every test (T="-k word" selects some)
	@$(BIN)/python -m deploy.local.build >/dev/null
	@$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(T)

faults: $(INSTALLED) ## Inject faults at every call of the operator and print a table (10 minutes; `make test` runs a sample)
	@$(BIN)/python -m deploy.local.build >/dev/null
	@FAULTS=all $(BIN)/python -m pytest tests/faults -n 0 $(T)

up: $(INSTALLED) ## Start API server, Twilio twin, operator and shim in the background (docs/development.md lists the options)
	@$(BIN)/python -m deploy.local up \
		$(if $(TWILIO_URL),--twilio-url '$(TWILIO_URL)') $(if $(TWILIO),--twilio '$(TWILIO)') \
		$(if $(WEBHOOK_URL_TEMPLATE),--webhook-url-template '$(WEBHOOK_URL_TEMPLATE)') $(if $(DATA),--etcd-data '$(DATA)')

down: $(INSTALLED) ## Stop what `make up` started
	@$(BIN)/python -m deploy.local down

image: ## Build the image with docker, buildah or podman (IMAGE=name:tag BASE=python:3.13-slim BUILD_BASE=... BUILDER=...)
	@test -n '$(BUILDER)' || { echo 'This needs docker, buildah or podman.' >&2; exit 1; }
	$(BUILDER) build --file deploy/Containerfile --tag '$(IMAGE)' $(BUILD_OPTIONS) \
		$(foreach each,BASE BUILD_BASE PIP_INDEX_URL PIP_TRUSTED_HOST,$(if $($(each)),--build-arg $(each))) .

kind-up: $(INSTALLED) ## Make a kind cluster with the chart and the Twilio twin, and leave it running (20 to 30 minutes the first time)
	@$(BIN)/python -m deploy.kind up

kind-down: $(INSTALLED) ## Remove what `make kind-up` made
	@$(BIN)/python -m deploy.kind down

kind-test: $(INSTALLED) ## Run the story with real pods in a kind cluster of its own, and print a table
	@$(BIN)/python -m deploy.kind.tools kubernetes helm kind >/dev/null
	@$(BIN)/python -m pytest tests/kind/story.py -n 0 -x -s -p no:cacheprovider $(T)

sbom: $(INSTALLED) ## List the image's Python packages with their hashes in build/sbom.cdx.json (CycloneDX), from the lock
	@mkdir -p build
	@$(BIN)/python -W ignore -m cyclonedx_py requirements --pyproject pyproject.toml --output-reproducible --short-PURLs \
		--output-file build/sbom.cdx.json requirements.lock

check: $(INSTALLED) ## Lint, check types, import rules and the Go code; writes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m deploy.local.build --vet
	$(BIN)/python -m tests.bench.gopeer --vet
	$(BIN)/python -m tests.gitops --vet
	$(BIN)/python -m tests.sealer

fix: $(INSTALLED) ## Fix what lint and format can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

manifests: $(INSTALLED) ## Write deploy/manifests and the schema of the values from the chart (HELM=path names another helm)
	@HELM=$${HELM:-$$($(BIN)/python -m deploy.kind.tools helm)} $(BIN)/python -m deploy.chart

chart: $(INSTALLED) ## Check the chart with helm, kubeconform and kube-score (HELM=path names another helm)
	@set -- $$($(BIN)/python -m deploy.kind.tools kubeconform kube-score helm) && CHART=required \
		KUBECONFORM=$$1 KUBE_SCORE=$$2 HELM=$${HELM:-$$3} $(BIN)/python -m pytest tests/chart -n 0 $(T)

monitoring: $(INSTALLED) ## Check the alert rules and the dashboard with promtool, built the first time (4 minutes)
	@PROMTOOL=$$($(BIN)/python -m deploy.monitoring.build) && export PROMTOOL && \
		$(BIN)/python -m pytest tests/unit/test_monitoring.py -n 0 $(T)

bench: $(INSTALLED) ## Measure speed, scale, fairness and the REST API (B="--help" lists its options)
	@$(BIN)/python -m deploy.local.build >/dev/null
	@$(BIN)/python -m tests.bench.gopeer >/dev/null
	@$(BIN)/python -m tests.bench $(B)

docs: $(INSTALLED) ## Write the reference pages, and build the site from README.md and docs/ into build/site
	@rm -rf build/site  # else Sphinx reads only what has changed, and is silent about old mistakes
	@$(BIN)/python -m deploy.reference
	@$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -c docs . build/site
	@echo 'build/site/index.html'

picture: $(INSTALLED) ## Draw the picture in README.md from the real output of its commands (needs kubectl)
	@$(BIN)/python -m deploy.local.build >/dev/null
	@$(BIN)/python -m deploy.local.picture

lock: $(INSTALLED) ## Update requirements.lock (runtime), -dev.lock (all) and -build.lock; UPGRADE=1 takes the newest versions
	$(LOCK) --output-file requirements.lock pyproject.toml
	$(LOCK) --extra dev --constraint requirements.lock --output-file requirements-dev.lock pyproject.toml
	$(LOCK) --group build --constraint requirements-dev.lock --output-file requirements-build.lock

clean: down kind-down ## Remove what was installed and left here (not the cached control plane)
	rm -rf .venv .local build .mypy_cache .ruff_cache .pytest_cache

$(INSTALLED): requirements.lock requirements-dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "This needs Python 3.11 or newer; " + sys.executable + " is " + sys.version.split()[0] + ". Choose another with: make PYTHON=python3.12 ...")'
	@echo "Installing into .venv (a minute the first time) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) --require-hashes --only-binary :all: -r requirements.lock -r requirements-dev.lock
	@$(PIP) --no-deps --no-build-isolation --no-index -e .
	@$(BIN)/python -m compileall -q -j 0 .venv/lib >/dev/null || true  # programs start seconds faster where bytecode cannot be written later
	@touch $@
