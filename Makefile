# `make run` trains through every stage; `make test` runs all tests. Both set up what they need.

CARGO ?= cargo
RUN ?= runs/tiny
# Worker processes of `make run`: one a core, up to the run's four lanes. The result does not depend on it.
WORKERS ?= $(shell cores=$$(nproc); echo $$((cores < 4 ? cores : 4)))
TINY := data/tiny

.PHONY: run mano test check bench soak fuzz fmt clean setup build data cuda

## Train the tiny model through all stages, with live output. A second call goes on where the first stopped.
run: build data
	@if [ -e $(RUN)/config.toml ]; then target/debug/anello run --resume $(RUN) --workers $(WORKERS); \
	else target/debug/anello run tiny --out $(RUN) --workers $(WORKERS); fi
	@target/debug/anello report $(RUN)

## Mano (docs/evaluation.md) on two cores in some twenty minutes: two layers looped six times, the same layers used once, and what
## both answer beside the paper's models. A second call goes on where the first stopped.
MANO := data/mano-small
mano: build
	@[ -e $(MANO)/eval/index.json ] || target/debug/anello data synth mano --out $(MANO) --length 7 --modulus 2 \
		--documents 1M --eval-documents 4000 --answer-only
	@for preset in mano-small mano-small-x1; do \
		run=runs/$$preset; \
		if [ -e $$run/config.toml ]; then target/debug/anello run --resume $$run --workers 2 --sample 0; \
		else target/debug/anello run $$preset --out $$run --workers 2 --sample 0; fi || exit 1; \
	done
	@target/debug/anello eval runs/mano-small --task mano --beside runs/mano-small-x1

## All tests.
test: setup
	@scripts/s3-venv
	@scripts/bucket-servers
	@scripts/test-tools
	@scripts/nvrtc-library
	@scripts/tensorboard-venv
	@scripts/kube-tools
	$(CARGO) build --quiet -p anello
	$(CARGO) test --workspace --no-fail-fast

## What CI checks before the tests.
check: setup
	$(CARGO) fmt --all -- --check
	$(CARGO) clippy --workspace --all-targets --quiet -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --document-private-items --quiet
	scripts/attention-kernels --check

## Speed and memory as ratios against baselines in the same run.
bench: setup
	scripts/bench

## Bytes of every kind to everything that reads bytes. Needs a nightly compiler and cargo-fuzz.
fuzz:
	tests/fuzz/run.sh

fmt:
	$(CARGO) fmt --all

setup:
	@scripts/setup-libtorch

## The CUDA half of LibTorch, for `--device cuda` (docs/gpu.md): 2.6 GB fetched once. The build does not need it.
cuda: setup
	@scripts/setup-cuda

build: setup
	$(CARGO) build -p anello

## Real text (see scripts/corpus.txt), a tokenizer trained on it, and token shards: made once.
data: build
	@scripts/fetch-corpus
	@test -e $(TINY)/tokenizer.json || \
		target/debug/anello data train-tokenizer $(TINY)/raw/docs $(TINY)/raw/code --vocab 2048 --out $(TINY)/tokenizer.json
	@for source in docs code; do test -e $(TINY)/$$source/index.json || \
		target/debug/anello data tokenize $(TINY)/raw/$$source --tokenizer $(TINY)/tokenizer.json \
			--out $(TINY)/$$source --row-group 32Ki --shard 1MiB || exit; done

clean:
	$(CARGO) clean
	rm -rf libtorch data/tiny .venv-bench .venv-s3 .venv-tensorboard .venv-kube .test-tools

## Simulated histories of the ring, then whole runs of real processes until stopped, with faults of new seeds.
soak: export ANELLO_SEED ?= $(shell date +%s)000
soak: export ANELLO_SOAK_SCHEDULES ?= 1000000
soak: export ANELLO_SOAK_RUNS ?= 1000000000
soak: setup
	$(CARGO) test -p anello-coordinator --lib -- --ignored soak --nocapture
	$(CARGO) test -p anello-tests --test e2e -- --ignored faults::soak --nocapture
