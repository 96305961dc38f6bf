"""Saving and loading a gibibyte of weights and moments against `torch.save` and `torch.distributed.checkpoint`.

    bench_checkpoint.py --checkpoint PROGRAM [--rounds N] [--within FOLDER]

PROGRAM is that of `worker/benches/checkpoint.rs`; FOLDER is on the disk to be measured, which is that of the build unless said.

The same tensors in size and number, on the same disk, one after the other in turn. Every save ends when it is on the disk, and
every load begins from the disk: what the kernel keeps of the files is dropped before. What each promises besides: ours has
hashed every block, was read back from the disk and compared, and is visible all at once; a load of ours checks every hash.
`torch.distributed.checkpoint` syncs by itself (`sync_files`) and checks nothing. `torch.save` neither syncs nor checks: the time
that it takes to return, with all of it in the kernel's memory, is told beside the time of the same file with `fsync`. A ratio is
the median over rounds of theirs by ours. What training waits for of a save is copied beside a bare copy, in turn, each first every
other time, in memory that the process has already.
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
    def __init__(self, program, keeps):
        environment = dict(os.environ)
        if keeps:
            # As a trainer does once it trains (`worker/src/ffi`): what was freed is the next copy's, without page faults.
            kept = f"glibc.malloc.mmap_threshold={1 << 30}:glibc.malloc.trim_threshold={1 << 40}"
            environment["GLIBC_TUNABLES"] = kept
        self.process = subprocess.Popen([program, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
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


def forget(folder):
    """Drops what the kernel keeps of the files of `folder`."""
    for path in Path(folder).rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def synced(file):
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


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
    # /tmp may be memory.
    parser.add_argument("--within", type=Path, default=ROOT / "target")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    import torch
    import torch.distributed.checkpoint as dcp

    # One that has saved before, and one whose memory is new with every load, as torch's is.
    ours, fresh = Ours(arguments.checkpoint, True), Ours(arguments.checkpoint, False)
    elements = (ours.mib << 18) // 3
    state = {name: torch.randn(elements) for name in ("weights", "exp_avg", "exp_avg_sq")}
    rows = {name: [] for name in ("save", "load", "copy", "bare", "torch.save", "torch.save.synced", "torch.load", "dcp.save", "dcp.load")}
    # The first has its memory made.
    for round in range(1 + 4 * arguments.rounds):
        copied = ours.ask("copy", ("ours", "bare")[round % 2])
        if round > 0:
            rows["copy"].append(copied["copy_seconds"])
            rows["bare"].append(copied["bare_seconds"])
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=arguments.within) as scratch:
        run, torchs, folder = (Path(scratch) / name for name in ("run", "torch", "dcp"))
        for _ in range(arguments.rounds):
            shutil.rmtree(run, ignore_errors=True)
            saved = clocked(lambda: ours.ask("save", run))[1]
            rows["save"].append(saved["seconds"])
            forget(run)
            rows["load"].append(clocked(lambda: fresh.ask("load", run))[1]["seconds"])
            shutil.rmtree(torchs, ignore_errors=True)
            torchs.mkdir()
            file = torchs / "state.pt"
            returned = clocked(lambda: torch.save(state, file))[0]
            rows["torch.save"].append(returned)
            file.unlink()
            rows["torch.save.synced"].append(clocked(lambda: (torch.save(state, file), synced(file)))[0])
            forget(torchs)
            seconds, loaded = clocked(lambda: torch.load(file))
            rows["torch.load"].append(seconds)
            assert loaded["exp_avg"].equal(state["exp_avg"])
            del loaded
            shutil.rmtree(folder, ignore_errors=True)
            rows["dcp.save"].append(clocked(lambda: dcp.save(state, checkpoint_id=folder, no_dist=True))[0])
            forget(folder)
            target = {name: torch.empty(elements) for name in state}
            rows["dcp.load"].append(clocked(lambda: dcp.load(target, checkpoint_id=folder, no_dist=True))[0])
            assert target["exp_avg"].equal(state["exp_avg"])
            del target
    ours.close()
    fresh.close()

    def ratio(theirs, own):
        return statistics.median(their / our for their, our in zip(rows[theirs], rows[own]))

    print(json.dumps({
        "bench": "worker/checkpoint", "mib": ours.mib, "torch": torch.__version__,
        "seconds": {name: statistics.median(taken) for name, taken in rows.items()},
        "copy_of_bare": 1 / ratio("bare", "copy"),
        "torch_save": ratio("torch.save.synced", "save"), "torch_save_returned": ratio("torch.save", "save"),
        "torch_load": ratio("torch.load", "load"),
        "dcp_save": ratio("dcp.save", "save"), "dcp_load": ratio("dcp.load", "load"),
    }), flush=True)


if __name__ == "__main__":
    main()
