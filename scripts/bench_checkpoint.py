"""Saving and loading a gibibyte of weights and moments against `torch.save` and `torch.distributed.checkpoint`.

    bench_checkpoint.py --checkpoint PROGRAM [--rounds N]    PROGRAM is that of `worker/benches/checkpoint.rs`

The same tensors in size and number, on the same disk, one after the other in turn. What each promises when it returns: ours
has hashed every block, is on the disk (fsync), was read back and compared, and is visible all at once; a load of ours
checks every hash. `torch.distributed.checkpoint` is on the disk (its `sync_files`) and checks nothing. `torch.save` checks
nothing and is in the kernel's memory: the disk is told to write it, and waited for, outside the clock. A ratio is the median over rounds of theirs by
ours.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Ours:
    def __init__(self, program):
        self.process = subprocess.Popen([program, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.mib = json.loads(self.process.stdout.readline())["mib"]

    def ask(self, word, folder):
        self.process.stdin.write(f"{word} {folder}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit("bench: the checkpoint program has ended")
        return json.loads(line)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def clocked(call):
    os.sync()
    began = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - began
    os.sync()
    return seconds, result


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    import torch
    import torch.distributed.checkpoint as dcp

    ours = Ours(arguments.checkpoint)
    elements = (ours.mib << 18) // 3
    state = {name: torch.randn(elements) for name in ("weights", "exp_avg", "exp_avg_sq")}
    rows = {name: [] for name in ("save", "load", "copy", "bare", "torch.save", "torch.load", "dcp.save", "dcp.load")}
    # On the disk of the build: /tmp may be memory.
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=ROOT / "target") as scratch:
        run, file, folder = (Path(scratch) / name for name in ("run", "state.pt", "dcp"))
        for _ in range(arguments.rounds):
            shutil.rmtree(run, ignore_errors=True)
            saved = clocked(lambda: ours.ask("save", run))[1]
            rows["save"].append(saved["seconds"])
            rows["copy"].append(saved["copy_seconds"])
            rows["bare"].append(saved["bare_seconds"])
            rows["load"].append(clocked(lambda: ours.ask("load", run))[1]["seconds"])
            file.unlink(missing_ok=True)
            rows["torch.save"].append(clocked(lambda: torch.save(state, file))[0])
            seconds, loaded = clocked(lambda: torch.load(file))
            rows["torch.load"].append(seconds)
            assert loaded["exp_avg"].equal(state["exp_avg"])
            del loaded
            shutil.rmtree(folder, ignore_errors=True)
            rows["dcp.save"].append(clocked(lambda: dcp.save(state, checkpoint_id=folder, no_dist=True))[0])
            target = {name: torch.empty(elements) for name in state}
            rows["dcp.load"].append(clocked(lambda: dcp.load(target, checkpoint_id=folder, no_dist=True))[0])
            assert target["exp_avg"].equal(state["exp_avg"])
            del target
    ours.close()

    def ratio(theirs, own):
        return statistics.median(their / our for their, our in zip(rows[theirs], rows[own]))

    print(json.dumps({
        "bench": "worker/checkpoint", "mib": ours.mib, "torch": torch.__version__,
        "seconds": {name: statistics.median(taken) for name, taken in rows.items()},
        "copy_of_bare": 1 / ratio("bare", "copy"),
        "torch_save": ratio("torch.save", "save"), "torch_load": ratio("torch.load", "load"),
        "dcp_save": ratio("dcp.save", "save"), "dcp_load": ratio("dcp.load", "load"),
    }), flush=True)


if __name__ == "__main__":
    main()
