"""What a worker holds with `ring.state_copies` = all and 2, over rings of 2, 3 and 4, in one run.

    bench_memory.py --anello PROGRAM [--steps N]

Each ring trains a model of 64 MiB of weights for a few steps. A worker's memory is what it has resident then (VmRSS), and the
most that it ever had (VmHWM): program, buffers of a step and data included.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import bench_recovery

MIB = 1 << 20
DEADLINE = 300
CONFIG = """
name = "recovery"
seed = 1
lanes = 4
stages = ["stable"]

[model]
layers = 2
hidden = 512
heads = 8
ffn = 2048
vocab = 8192

[compute]
threads = 1

[data]
tokenizer = "tokenizer.json"
prefetch_bytes = "1MiB"
sources.words.url = "words"

[checkpoint]
every_steps = 1000000

[stage.stable]
tokens = "1Gi"
sequence = 32
batch = 128
micro_batch = 1
lr = 1e-3
loops = 1
beta = 0.1
mixture = { words = 1 }
"""


def resident(process):
    """(now, most ever), bytes."""
    text = Path(f"/proc/{process.pid}/status").read_text()
    return [int(re.search(rf"{name}:\s+(\d+) kB", text)[1]) * 1024 for name in ("VmRSS", "VmHWM")]


def measure(program, folder, members, copies, steps):
    run = f"run-{members}-{copies}"
    out = folder / f"{run}.out"
    value = copies if copies.isdigit() else f'"{copies}"'
    coordinator = subprocess.Popen(
        [program, "run", "recovery.toml", "--out", run, "--workers", str(members), "--external", "--sample", "0",
         "--set", f"ring.state_copies={value}"],
        cwd=folder, stdin=subprocess.DEVNULL, stdout=open(out, "w"), stderr=open(folder / f"{run}.log", "w"))
    workers = []
    try:
        found = bench_recovery.wait("the coordinator", lambda: re.search(r"coordinator at ([0-9.:]+)", out.read_text()))
        workers = [bench_recovery.Worker(program, folder, found[1]) for _ in range(members)]
        bench_recovery.wait("the ring", lambda: bench_recovery.trains(workers, 0, steps))
        return [resident(worker.process) for worker in workers]
    finally:
        for worker in workers:
            worker.end()
        coordinator.kill()
        coordinator.wait()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--anello", required=True)
    parser.add_argument("--steps", type=int, default=6)
    a = parser.parse_args()
    bench_recovery.CONFIG, bench_recovery.DEADLINE = CONFIG, DEADLINE
    program = str(Path(a.anello).resolve())
    with tempfile.TemporaryDirectory(prefix="anello-bench-") as scratch:
        folder = Path(scratch)
        bench_recovery.make_data(program, folder)
        for members in (2, 3, 4):
            found = {copies: measure(program, folder, members, copies, a.steps) for copies in ("all", "2")}
            mean = lambda copies, at: statistics.mean(worker[at] for worker in found[copies]) / MIB
            print(json.dumps({"bench": "ring/memory", "members": members, "all_mib": mean("all", 0), "two_mib": mean("2", 0),
                              "all_peak_mib": mean("all", 1), "two_peak_mib": mean("2", 1),
                              "ratio": mean("2", 0) / mean("all", 0), "saved_mib": mean("all", 0) - mean("2", 0)}), flush=True)


if __name__ == "__main__":
    main()
