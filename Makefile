# make setup | test | lint | demo | demo-short | clean | help     PYTHON=python3.12 picks the interpreter
PYTHON ?= python3
# Processes that share the tests, each with one thread and up to 2 GB; 0: all in one, as a debugger needs it.
TEST_WORKERS ?= 2
.PHONY: setup test lint demo demo-short clean help

help:
	@echo "make demo         train, fine-tune and evaluate on the embedded data set (minutes on two cores)"
	@echo "make demo-short   the same in a shorter form, to see that everything works; the figures mean nothing"
	@echo "make test         the default test suite, in two processes (TEST_WORKERS=8, PYTEST_OPTS=\"-k fewx\")"
	@echo "make lint         formatting, lint and import contracts"
	@echo "make setup        install only; the other targets call it"
	@echo "make clean        remove the installation (.venv, .setup)"
	@echo "PYTHON=python3.12 behind any of them picks the interpreter"

setup:
	@$(PYTHON) tools/setup_env.py

# Threads that wait must sleep, not spin: spinning costs a multiple of the time where other programs share the cores.
RUN = OMP_WAIT_POLICY=passive PYTHONPATH="$(CURDIR)" "$$(cat .setup/python)"

test: setup
	OMP_NUM_THREADS=1 $(RUN) -m pytest $(PYTEST_OPTS) -n $(TEST_WORKERS) --dist loadfile

lint: setup
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -c "import sys; from importlinter.cli import lint_imports_command as lint; sys.exit(lint())"

demo: setup
	$(RUN) tools/demo.py

demo-short: setup
	$(RUN) tools/demo.py --short

clean:
	rm -rf .venv .setup
