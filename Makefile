# Isocenter. `make` alone lists what there is. Nothing is needed but make and Python 3.11 or 3.12.
.DEFAULT_GOAL := help
.PHONY: help env demo test check bench profile acceptance docs sbom wheelhouse clean-room pictures clean

PYTHON := .venv/bin/python
STAMP := .venv/.installed
SOURCES := fl_server fl_client models privacy configs deploy tests

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'

env: $(STAMP) ## create .venv with everything that is needed (minutes the first time, then nothing)

$(STAMP): pyproject.toml constraints.txt
	@set -e; for candidate in python3.11 python3.12 python3; do \
		if "$$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then \
			[ -x $(PYTHON) ] || "$$candidate" -m venv .venv; exit 0; \
		fi; \
	done; \
	echo "Isocenter needs Python 3.11 or 3.12, and neither python3.11, python3.12 nor python3 is one." >&2; \
	echo "Install one of them (for example: apt install python3.11 python3.11-venv), then run make again." >&2; \
	exit 1
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: env ## a coordinator and three phantom hospitals on this machine, from joining to the report in ./demo
	@$(PYTHON) deploy/demo.py

# Two processes, each with whole files, because many tests share what a file starts once.
test: env ## run the tests
	@$(PYTHON) -m pytest -n 2 --dist loadfile

check: env ## everything that must hold before a commit: format, lint, types, tests
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m mypy
	@$(PYTHON) -m pytest -n 2 --dist loadfile

bench: env ## measure everything beside its least, 35 minutes alone on the machine; writes bench.json and docs/benchmarks.md
	@$(PYTHON) deploy/bench.py

profile: env ## flame graphs of both sides of a round, in profile/ (as root: py-spy looks into the process that trains)
	@$(PYTHON) deploy/flames.py

acceptance: env ## train on real radiographs, where they are present (OUT=folder, TEMPLATE=opacity_private)
	@PATH="$(CURDIR)/.venv/bin:$$PATH" tests/acceptance/real_radiographs.sh $(or $(OUT),demo/acceptance) $(TEMPLATE)

docs: env ## make the reference pages of docs/ from the code
	@$(PYTHON) tests/test_docs.py --write

sbom: env ## list what Isocenter is made of, from constraints.txt, as CycloneDX (docs/sbom.cdx.json)
	@$(PYTHON) deploy/sbom.py

wheelhouse: env ## a release folder to install from without a package index: dist/isocenter-VERSION
	@$(PYTHON) deploy/wheelhouse.py

clean-room: env ## play the three guides as printed, away from the checkout; writes clean-room.json
	@$(PYTHON) deploy/clean_room.py

pictures: env ## make the pictures of the guides anew (docs/pictures); needs chromium
	@$(PYTHON) deploy/pictures.py

clean: ## remove what the other targets made, the environment too
	@rm -rf .venv demo profile build dist bench.json clean-room.json *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
