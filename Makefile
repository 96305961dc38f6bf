# `make run` trains through every stage; `make test` runs all tests. Both set up what they need.

CARGO ?= cargo
RUN ?= runs/tiny

.PHONY: run test check bench fmt clean setup build data

## Train the tiny model through all stages, with live output. A second call goes on where the first stopped.
run: build data
	@if [ -e $(RUN)/config.toml ]; then target/debug/anello run --resume $(RUN); else target/debug/anello run tiny --out $(RUN); fi
	@target/debug/anello report $(RUN)

## All tests.
test: setup
	$(CARGO) build --quiet -p anello
	$(CARGO) test --workspace

## What CI checks before the tests.
check: setup
	$(CARGO) fmt --all -- --check
	$(CARGO) clippy --workspace --all-targets --quiet -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --document-private-items --quiet

## Speed and memory as ratios against baselines in the same run.
bench: setup
	scripts/bench

fmt:
	$(CARGO) fmt --all

setup:
	@scripts/setup-libtorch

build: setup
	$(CARGO) build -p anello

data: build
	@scripts/fetch-corpus
	@scripts/tokenize-corpus

clean:
	$(CARGO) clean
	rm -rf libtorch data/tiny .venv-bench
