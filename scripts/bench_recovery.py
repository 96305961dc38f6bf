"""From SIGKILL of one of four workers to the next step: Anello's ring against torchrun's elastic restart, in one run.

    bench_recovery.py --anello PROGRAM     the comparison, and what a joiner costs those that run
    bench_recovery.py --anello PROGRAM --joins N
                                           what a joiner costs by the size of the state, N times each
    bench_recovery.py torch FOLDER         a worker under torchrun

Both train a model of the same shape, small enough that a step is short on any machine (BENCH_SHAPE=tiny: the preset's). Anello's coordinator runs with
`--external`, and the killed worker is replaced from here, so that the pause before it is started again is not in it.
A recovery ends when every survivor has applied a step of a later generation (torchrun: when every process has finished a
step after the restart). A joiner's cost is the longest time between two steps of a survivor, from the joiner's start
until five steps after it has entered, less the median step: in the joiner's whole life it pauses the ring twice.

`--joins`: two workers train, and a third comes. What those that train wait for it is the time from where they leave a ring to
where the next one has met and all have their state, at each boundary at which it enters (to be sent the state, and to be given
lanes), summed. It is measured for two sizes of the state (BENCH_SHAPE=state-24 and state-384), and beside each with
`ring.state_copies = 2`, where a joiner has the weights with a step of the others, and its share of the moments meanwhile.
"""

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

WORKERS = 4
# `tiny` is the preset's shape, whose step on two cores takes longer than a recovery may: it shows that survivors keep what they computed.
SHAPES = {"small": (2, 64, 4, 128, 512, 2, 64, 512), "tiny": (2, 192, 6, 512, 2048, 4, 128, 2048)}
# The others have a small step and a large vocabulary, so a large state: what a joiner waits for by the size of the state.
SHAPES |= {"state-24": (1, 64, 4, 128, 14336, 1, 16, 64), "state-384": (1, 256, 4, 512, 64000, 1, 16, 64)}
SHAPE = os.environ.get("BENCH_SHAPE", "small")
LAYERS, HIDDEN, HEADS, FFN, VOCAB, LOOPS, SEQUENCE, BATCH = SHAPES[SHAPE]
# Weights and two moments, of an embedding and an lm_head beside the layers.
STATE_MIB = round(3 * 4 * (2 * VOCAB * HIDDEN + LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN)) / 2**20)
DEADLINE = 120

CONFIG = f"""
name = "recovery"
seed = 1
lanes = {WORKERS}
stages = ["stable"]

[model]
layers = {LAYERS}
hidden = {HIDDEN}
heads = {HEADS}
ffn = {FFN}
vocab = {VOCAB}

[compute]
threads = 1
recompute = "none"

[data]
tokenizer = "tokenizer.json"
prefetch_bytes = "1MiB"
sources.words.url = "words"

[checkpoint]
every_steps = 50
keep_last = 3

[stage.stable]
tokens = "1Gi"
sequence = {SEQUENCE}
batch = {BATCH}
micro_batch = {BATCH // SEQUENCE // WORKERS}
lr = 1e-3
loops = {LOOPS}
beta = 0.1
mixture = {{ words = 1 }}
"""

LEFT = re.compile(r"^(\S+)Z .*left the ring generation=(\d+)", re.M)
READY = re.compile(r"^(\S+)Z .*has its share of the state generation=(\d+)", re.M)
APPLIED = re.compile(r"^(\S+)Z .*applied a step generation=(\d+) step=(\d+)", re.M)


def wait(what, condition):
    until = time.time() + DEADLINE
    while True:
        found = condition()
        if found:
            return found
        if time.time() > until:
            sys.exit(f"bench_recovery: waited {DEADLINE} s in vain for {what}")
        time.sleep(0.01)


class Steps:
    """The steps that a process has told of in a file, read on from where the last look ended."""

    def __init__(self, path, parse):
        self.path, self.parse, self.at, self.rest, self.all = path, parse, 0, "", []

    def read(self):
        """(seconds, generation, step), in order."""
        if self.path.exists():
            with open(self.path) as file:
                file.seek(self.at)
                text = self.rest + file.read()
                self.at = file.tell()
            text, _, self.rest = text.rpartition("\n")
            self.all += self.parse(text + "\n")
        return self.all


def at_of(text):
    return datetime.fromisoformat(text + "+00:00").timestamp()


def applied(text):
    return [(at_of(at), int(generation), int(step))
            for at, generation, step in APPLIED.findall(text)]


class Worker:
    count = 0

    def __init__(self, program, folder, address):
        Worker.count += 1
        path = folder / f"worker-{Worker.count}.log"
        environment = {**os.environ, "RUST_LOG": "warn,anello_worker::ring=debug", "NO_COLOR": "1"}
        command = [program, "worker", "--coordinator", address, "--job", "recovery", "--threads", "1"]
        self.process = subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL,
                                        stdout=subprocess.DEVNULL, stderr=open(path, "w"))
        self.steps = Steps(path, applied)

    def end(self):
        self.process.kill()
        self.process.wait()


def trains(workers, after, steps):
    """The generation, later than `after`, in which all workers have applied so many steps."""
    told = [worker.steps.read() for worker in workers]
    if not all(told):
        return None
    newest = {steps[-1][1] for steps in told}
    if len(newest) > 1 or min(newest) <= after:
        return None
    [generation] = newest
    return generation if all(sum(of == generation for _, of, _ in each) >= steps for each in told) else None


def make_data(program, folder):
    dice = random.Random(3)
    words = ["the", "ring", "of", "workers", "turns", "and", "every", "step", "leaves", "its", "mark", "on", "a", "loop"]
    with open(folder / "words.jsonl", "w") as file:
        for _ in range(2000):
            file.write(json.dumps({"text": " ".join(dice.choice(words) for _ in range(60))}) + "\n")
    run = lambda *arguments: subprocess.run([program, *arguments], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    run("data", "train-tokenizer", "words.jsonl", "--vocab", "400", "--out", "tokenizer.json")
    run("data", "tokenize", "words.jsonl", "--tokenizer", "tokenizer.json", "--out", "words")
    (folder / "recovery.toml").write_text(CONFIG)


def ours(program, folder, kills, dice):
    make_data(program, folder)
    command = [program, "run", "recovery.toml", "--out", "run", "--workers", str(WORKERS), "--external", "--sample", "0"]
    out = folder / "coordinator.out"
    coordinator = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=open(out, "w"),
                                   stderr=open(folder / "coordinator.log", "w"))
    workers, recoveries, joins, steps, own_steps = [], [], [], [], []
    try:
        found = wait("the coordinator", lambda: re.search(r"coordinator at ([0-9.:]+)", out.read_text()))
        workers = [Worker(program, folder, found[1]) for _ in range(WORKERS)]
        generation = wait("the ring", lambda: trains(workers, 0, 8))
        for _ in range(kills):
            time.sleep(dice.random() / 2)
            victim = workers.pop(dice.randrange(WORKERS))
            at = time.time()
            victim.end()
            generation = wait("the survivors", lambda: trains(workers, generation, 1))
            recoveries.append(max(next(when for when, of, _ in worker.steps.all if of == generation) for worker in workers) - at)
            generation = wait("the survivors to go on", lambda: trains(workers, generation - 1, 8))
            at = time.time()
            workers.append(Worker(program, folder, found[1]))
            generation = wait("the joiner", lambda: trains(workers, generation, 6))
            for worker in workers[:-1]:
                times = [when for when, _, _ in worker.steps.read()]
                quiet = [b - a for a, b in zip(times, times[1:]) if b < at][-25:]
                after = [when for when, of, _ in worker.steps.all if of == generation]
                gaps = [b - a for a, b in zip(times, times[1:]) if a >= at and b <= after[5]]
                step = statistics.median(quiet)
                joins.append((max(gaps) - step) / step)
                # The gap over the boundary at which it enters: what the ring itself needs.
                entry = next(b - a for a, b in zip(times, times[1:]) if b == after[0])
                own_steps.append((entry - step) / step)
                steps.append(step)
    finally:
        for worker in workers:
            worker.end()
        coordinator.kill()
        coordinator.wait()
    return recoveries, joins, own_steps, statistics.median(steps)


def joiners(program, folder, copies, count):
    """Of each joiner: seconds that those that train waited at boundaries, and steps that they made while it was sent the state."""
    make_data(program, folder)
    running = 2
    command = [program, "run", "recovery.toml", "--out", "run", "--workers", str(running + 1), "--external", "--sample", "0",
               "--set", f"ring.state_copies={copies}", "--set", "checkpoint.every_steps=1000000", "--set", "ring.digest_every_steps=0"]
    out = folder / "coordinator.out"
    coordinator = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=open(out, "w"),
                                   stderr=open(folder / "coordinator.log", "w"))
    workers, waited, meanwhile, steps = [], [], [], []
    try:
        found = wait("the coordinator", lambda: re.search(r"coordinator at ([0-9.:]+)", out.read_text()))
        workers = [Worker(program, folder, found[1]) for _ in range(running)]
        generation = wait("the ring", lambda: trains(workers, 0, 12))
        for _ in range(count):
            before = generation
            workers.append(Worker(program, folder, found[1]))
            # Learning is a generation, and training another one.
            entered = before + 2
            generation = wait("the joiner", lambda: trains(workers, entered - 1, 3))
            for worker in workers[:running]:
                told = worker.steps.read()
                quiet = [b[0] - a[0] for a, b in zip(told, told[1:]) if a[1] == b[1] == before]
                steps.append(statistics.median(quiet[-25:]))
                meanwhile.append(sum(before < of < generation for _, of, _ in told))
                text = worker.steps.path.read_text()
                left, ready = ({int(of): at_of(at) for at, of in pattern.findall(text)} for pattern in (LEFT, READY))
                waited.append(sum(ready[of + 1] - left[of] for of in range(before, generation)))
            workers.pop().end()
            generation = wait("the others to go on", lambda: trains(workers, generation, 12))
    finally:
        for worker in workers:
            worker.end()
        coordinator.kill()
        coordinator.wait()
    return waited, meanwhile, statistics.median(steps)


def torch_worker(folder):
    import warnings

    warnings.simplefilter("ignore")
    import torch
    import torch.distributed as dist
    from torch import nn

    torch.set_num_threads(1)
    torch.manual_seed(1)
    rank, members, restart = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"))
    # The agent's store outlives a restart: without a prefix of their own, processes find the addresses of dead ones.
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    dist.init_process_group("gloo", store=dist.PrefixStore(f"restart-{restart}", store), rank=rank, world_size=members)
    layer = lambda: nn.TransformerEncoderLayer(HIDDEN, HEADS, FFN, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.ModuleDict({"embed": nn.Embedding(VOCAB, HIDDEN), "layers": nn.ModuleList(layer() for _ in range(LAYERS)),
                           "head": nn.Linear(HIDDEN, VOCAB)})
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    saved, step = Path(folder) / "checkpoint.pt", 0
    if saved.exists():
        state = torch.load(saved)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    mask = nn.Transformer.generate_square_subsequent_mask(SEQUENCE)
    with open(Path(folder) / f"rank-{rank}.log", "a", buffering=1) as log:
        while True:
            tokens = torch.randint(VOCAB, (BATCH // SEQUENCE // members, SEQUENCE + 1))
            x = model["embed"](tokens[:, :-1])
            loss = 0
            for _ in range(LOOPS):
                for each in model["layers"]:
                    x = each(x, mask, is_causal=True)
                loss = loss + nn.functional.cross_entropy(model["head"](x).flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
            optimizer.step()
            step += 1
            log.write(f"{time.time()} {restart + 1} {step} {os.getpid()}\n")
            if step % 50 == 0 and rank == 0:
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, f"{saved}.new")
                os.replace(f"{saved}.new", saved)


def theirs(folder, kills, dice):
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", str(WORKERS), "--max-restarts", "1000",
               "--monitor-interval", "0.1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", __file__, "torch", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    agent = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                             stderr=open(folder / "torchrun.log", "w"), start_new_session=True)
    parse = lambda text: [(float(line.split()[0]), *map(int, line.split()[1:])) for line in text.splitlines() if line.strip()]
    ranks = [Steps(folder / f"rank-{rank}.log", parse) for rank in range(WORKERS)]

    def all_at(restart, steps):
        told = [rank.read() for rank in ranks]
        return all(sum(of == restart for _, of, _, _ in each) >= steps for each in told)

    recoveries = []
    try:
        wait("torchrun", lambda: all_at(1, 8))
        for restart in range(1, kills + 1):
            time.sleep(dice.random() / 2)
            victim = dice.choice(ranks).read()[-1][3]
            at = time.time()
            os.kill(victim, signal.SIGKILL)
            wait("torchrun's restart", lambda: all_at(restart + 1, 1))
            recoveries.append(max(next(when for when, of, _, _ in rank.all if of == restart + 1) for rank in ranks) - at)
            wait("torchrun to go on", lambda: all_at(restart + 1, 8))
    finally:
        os.killpg(agent.pid, signal.SIGTERM)
        try:
            agent.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(agent.pid, signal.SIGKILL)
            agent.wait()
    return recoveries


def main():
    if sys.argv[1:2] == ["torch"]:
        return torch_worker(sys.argv[2])
    parser = argparse.ArgumentParser()
    parser.add_argument("--anello", required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--torch-kills", type=int, default=8)
    parser.add_argument("--joins", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    a = parser.parse_args()
    if a.joins:
        with tempfile.TemporaryDirectory(prefix="anello-bench-") as scratch:
            for copies in ("all", "2"):
                folder = Path(scratch) / copies
                folder.mkdir()
                waited, meanwhile, step = joiners(str(Path(a.anello).resolve()), folder, copies, a.joins)
                print(json.dumps({"bench": "ring/joiner", "shape": SHAPE, "state_mib": STATE_MIB, "state_copies": copies, "joins": a.joins,
                                  "step_seconds": step, "waited_seconds_median": statistics.median(waited),
                                  "waited_seconds_max": max(waited), "steps_meanwhile": statistics.median(meanwhile)}), flush=True)
        return
    dice = random.Random(a.seed)
    with tempfile.TemporaryDirectory(prefix="anello-bench-") as scratch:
        folders = [Path(scratch) / name for name in ("ours", "theirs")]
        [folder.mkdir() for folder in folders]
        recoveries, joins, entries, step = ours(str(Path(a.anello).resolve()), folders[0], a.kills, dice)
        row = {"bench": "ring/recovery", "shape": SHAPE, "kills": a.kills, "median_seconds": statistics.median(recoveries), "max_seconds": max(recoveries),
               "step_seconds": step, "join_steps_median": statistics.median(joins), "join_steps_max": max(joins),
               "entry_steps_median": statistics.median(entries), "entry_steps_max": max(entries)}
        if a.torch_kills:
            other = theirs(folders[1], a.torch_kills, dice)
            row |= {"torch_kills": len(other), "torch_median_seconds": statistics.median(other), "torch_max_seconds": max(other),
                    "ratio": statistics.median(other) / statistics.median(recoveries)}
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
