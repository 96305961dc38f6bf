"""What a worker holds with `ring.state_copies` = all and 2, over rings of 2, 3 and 4, and with the language model frozen, in one run.

    bench_memory.py --anello PROGRAM [--steps N]

Each ring trains a model of 64 MiB of weights for a few steps. A worker's memory is what it has resident then (VmRSS), and the
most that it ever had (VmHWM): program, buffers of a step and data included. The last ring, of one, trains all and then the gate alone:
with its moments let go, as is the default, and kept (`reset_optimizer = false`).
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


def shared(copies):
    return [f"ring.state_copies={copies if copies.isdigit() else json.dumps(copies)}"]


def frozen(resets):
    gate = 'loss="gate",tokens="1Gi",sequence=32,batch=128,lr=1e-3,loops=2,mixture={words=1}'
    resets = "true" if resets else "false"
    return ['stages=["stable","gate"]', "stage.stable.tokens=256", f"stage.gate={{{gate},reset_optimizer={resets}}}"]


def measure(program, folder, members, name, sets, steps):
    run = f"run-{members}-{name}"
    out = folder / f"{run}.out"
    coordinator = subprocess.Popen(
        [program, "run", "recovery.toml", "--out", run, "--workers", str(members), "--external", "--sample", "0",
         *(word for set_ in sets for word in ("--set", set_))],
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
            found = {copies: measure(program, folder, members, copies, shared(copies), a.steps) for copies in ("all", "2")}
            mean = lambda copies, at: statistics.mean(worker[at] for worker in found[copies]) / MIB
            print(json.dumps({"bench": "ring/memory", "members": members, "all_mib": mean("all", 0), "two_mib": mean("2", 0),
                              "all_peak_mib": mean("all", 1), "two_peak_mib": mean("2", 1),
                              "ratio": mean("2", 0) / mean("all", 0), "saved_mib": mean("all", 0) - mean("2", 0)}), flush=True)
        [gone], [kept] = [measure(program, folder, 1, f"resets-{resets}", frozen(resets), a.steps) for resets in (True, False)]
        print(json.dumps({"bench": "ring/frozen", "mib": gone[0] / MIB, "kept_mib": kept[0] / MIB, "ratio": gone[0] / kept[0],
                          "saved_mib": (kept[0] - gone[0]) / MIB}), flush=True)


if __name__ == "__main__":
    main()
