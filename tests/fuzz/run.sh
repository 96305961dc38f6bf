#!/bin/sh
# Fuzzes every target for so many seconds (default: 60), or those that are named: tests/fuzz/run.sh [SECONDS [TARGET...]].
# Needs a nightly compiler and `cargo install cargo-fuzz`. What it finds is in tests/fuzz/artifacts.
set -eu
cd "$(dirname "$0")"
# For the target that reads weights, whose crate links LibTorch.
export LD_LIBRARY_PATH="$(cd ../.. && pwd)/libtorch/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
seconds=${1:-60}
[ $# -eq 0 ] || shift
cargo +nightly fuzz --version > /dev/null 2>&1 || {
    echo "fuzzing needs a nightly compiler and cargo-fuzz: rustup toolchain install nightly && cargo install cargo-fuzz" >&2
    exit 2
}
[ $# -gt 0 ] || set -- $(cargo +nightly fuzz list --fuzz-dir .)
for target; do
    echo "== $target"
    mkdir -p "corpus/$target" "seeds/$target"
    # A thread of a scope may not have freed yet what is its own alone when the scope is over, which is taken for a leak.
    cargo +nightly fuzz run --fuzz-dir . "$target" "corpus/$target" "seeds/$target" -- \
        -max_total_time="$seconds" -detect_leaks=0 -timeout=10 -rss_limit_mb=2048 -print_funcs=0 -verbosity=0
done
