#!/usr/bin/env python3
"""What it costs to look for wrong bits: a step with and without comparing replicas and computing a lane twice.

    bench_checks.py --anello PROGRAM [--steps N] [--rounds N]

Two workers, the shape of the preset `tiny`, no checkpoints; one run each with neither check, with `ring.digest_every_steps = 1` and
with `ring.spot_check_every_steps = 1`, in turn, round after round. Of a run the median step counts, of the rounds the median. A check
every N steps costs an Nth of what it costs in each: so does the row for the intervals that a run has by default.

Prints one JSON row.
"""

import argparse
import csv
import io
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

os.environ["BENCH_SHAPE"] = "tiny"

import bench_recovery

# As configs/README.md has them.
DEFAULT_DIGEST, DEFAULT_SPOT = 100, 500
NEVER = 0


def step_seconds(program, folder, out, digest, spot, steps):
    tokens = steps * bench_recovery.BATCH
    settings = {"stage.stable.tokens": tokens, "checkpoint.every_steps": 1000000, "ring.digest_every_steps": digest,
                "ring.spot_check_every_steps": spot, "record.digest_every_steps": 1000000}
    command = [program, "run", "recovery.toml", "--out", out, "--workers", "2", "--sample", "0"]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    subprocess.run(command, cwd=folder, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    told = subprocess.run([program, "metrics", out, "--csv"], cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout
    rows = list(csv.DictReader(io.StringIO(told)))
    assert len(rows) == steps, f"{len(rows)} of {steps} steps were logged"
    # The first ones warm up, the last one ends with a checkpoint.
    return statistics.median(float(row["step_s"]) for row in rows[3:-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anello", required=True)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    program = str(Path(arguments.anello).resolve())
    settings = {"off": (NEVER, NEVER), "digest": (1, NEVER), "spot": (NEVER, 1)}
    seconds = {name: [] for name in settings}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        bench_recovery.make_data(program, folder)
        for number in range(arguments.rounds):
            for name, (digest, spot) in settings.items():
                out = f"{name}-{number}"
                seconds[name].append(step_seconds(program, folder, out, digest, spot, arguments.steps))
    median = {name: statistics.median(all_of) for name, all_of in seconds.items()}
    digest, spot = (median[name] / median["off"] for name in ("digest", "spot"))
    default = (digest - 1) / DEFAULT_DIGEST + (spot - 1) / DEFAULT_SPOT
    print(json.dumps({"bench": "ring/checks", "workers": 2, "steps": arguments.steps, "rounds": arguments.rounds,
                      "step_seconds": median["off"], "digest_ratio": digest, "spot_ratio": spot, "default_share": default}))


if __name__ == "__main__":
    main()
