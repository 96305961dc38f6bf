"""The step of `worker/benches/step.rs` written plainly in eager PyTorch: same weights, documents, objective, update.

    bench_torch.py serve DIR RECOMPUTE THREADS    a step for each line read; DIR is what `step serve` wrote
    bench_torch.py                                the comparison: this file against `step`, step by step in turn

RECOMPUTE is `none` (autograd keeps everything) or `layer` (`torch.utils.checkpoint` around each layer, at every loop
step), as in Anello. The model is what a good PyTorch user writes: fused qkv and gate/up projections, native SiLU and
RMSNorm, scaled_dot_product_attention over rows with a block-diagonal mask or document by document (whichever is faster
for the shape, see ATTENTION), all logits of a micro-batch at once, fused AdamW, foreach clip.

Both sides call the same libtorch_cpu.so with the same number of threads, which wait without spinning unless
OMP_WAIT_POLICY says otherwise. The ratio that counts is of CPU seconds, since other programs disturb it least.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build(folder, recompute):
    import numpy as np
    import torch
    import torch.nn.functional as F
    from torch import nn
    from torch.utils.checkpoint import checkpoint

    case = json.loads((folder / "case.json").read_text())
    d, heads, ffn, eps = case["hidden"], case["heads"], case["ffn"], case["rms_eps"]
    loops, beta = case["loops"], case["beta"]
    attention_by = os.environ.get("ATTENTION", "rows")

    def rotate(x, cos, sin):
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
            self.gate_up, self.down = nn.Linear(d, 2 * ffn, bias=False), nn.Linear(ffn, d, bias=False)
            self.norm1, self.norm2, self.norm3, self.norm4 = (nn.RMSNorm(d, eps) for _ in range(4))

        def attention(self, x, batch):
            b, s, _ = x.shape
            q, k, v = self.qkv(x).view(b, s, 3, heads, d // heads).unbind(2)
            q, k = rotate(q, batch.cos, batch.sin), rotate(k, batch.cos, batch.sin)
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            if attention_by == "rows":
                mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=batch.mask).transpose(1, 2)
            else:
                rows = []
                for row, lengths in enumerate(batch.lengths):
                    parts = (t[row : row + 1].split(lengths, 2) for t in (q, k, v))
                    rows.append(torch.cat([F.scaled_dot_product_attention(*p, is_causal=True) for p in zip(*parts)], 2))
                mixed = torch.cat(rows).transpose(1, 2)
            return self.out(mixed.reshape(b, s, d))

        def mlp(self, x):
            gate, up = self.gate_up(x).chunk(2, -1)
            return self.down(F.silu(gate) * up)

        def forward(self, h, batch):
            h = h + self.norm2(self.attention(self.norm1(h), batch))
            return h + self.norm4(self.mlp(self.norm3(h)))

    class LoopLM(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(case["vocab"], d)
            self.layers = nn.ModuleList(Layer() for _ in range(case["layers"]))
            self.norm, self.lm_head, self.gate = nn.RMSNorm(d, eps), nn.Linear(d, case["vocab"], bias=False), nn.Linear(d, 1)

        def loss(self, batch):
            h, hidden = self.embed(batch.ids), []
            for _ in range(loops):
                for layer in self.layers:
                    h = checkpoint(layer, h, batch, use_reentrant=False) if recompute == "layer" else layer(h, batch)
                h = self.norm(h)
                hidden.append(h)
            hidden = torch.stack(hidden)
            logits = self.lm_head(hidden).flatten(0, -2)
            targets = batch.targets.flatten()
            nll = F.cross_entropy(logits, targets.repeat(loops), reduction="none").view(loops, -1)
            gate = self.gate(hidden).view(loops, -1)[:-1]
            log_survival = F.pad(F.logsigmoid(-gate).cumsum(0), (0, 0, 1, 0))
            log_exit = log_survival + F.pad(F.logsigmoid(gate), (0, 0, 0, 1))
            exit = log_exit.exp()
            per_token = (exit * nll).sum(0) + beta * (exit * log_exit).sum(0)
            return (per_token * (targets >= 0)).sum()

    class Batch:
        def __init__(self, b):
            rows = b["sequences"]
            shaped = lambda key: b[key].view(rows, -1)
            self.ids, self.targets, positions = shaped("input_ids"), shaped("targets"), shaped("positions")
            s = self.ids.shape[1]
            half = torch.arange(d // heads // 2) * 2 / (d // heads)
            angles = positions.float().unsqueeze(-1) * float(case["rope_base"]) ** -half
            self.cos, self.sin = angles.cos().unsqueeze(2), angles.sin().unsqueeze(2)
            document = (positions.flatten() == 0).cumsum(0).view(rows, s)
            self.mask = (document.unsqueeze(2) == document.unsqueeze(1)).tril().unsqueeze(1)
            starts = [p for p in b["segment_starts"]] + [rows * s]
            self.lengths = [[] for _ in range(rows)]
            for start, end in zip(starts, starts[1:]):
                self.lengths[start // s].append(end - start)

    model = LoopLM()
    flat = torch.from_numpy(np.fromfile(folder / "weights.f32", dtype=np.float32))
    tensors = {}
    for e in case["entries"]:
        n = int(np.prod(e["shape"]))
        tensors[e["name"].removeprefix("model.")] = flat[e["offset"] : e["offset"] + n].view(e["shape"])
    with torch.no_grad():
        model.embed.weight.copy_(tensors["embed_tokens.weight"])
        model.lm_head.weight.copy_(tensors["lm_head.weight"])
        model.norm.weight.copy_(tensors["norm.weight"])
        model.gate.weight.copy_(tensors["early_exit_gate.weight"])
        model.gate.bias.copy_(tensors["early_exit_gate.bias"])
        for l, layer in enumerate(model.layers):
            of = lambda *parts: torch.cat([tensors[f"layers.{l}.{p}.weight"] for p in parts])
            layer.qkv.weight.copy_(of("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
            layer.out.weight.copy_(of("self_attn.o_proj"))
            layer.gate_up.weight.copy_(of("mlp.gate_proj", "mlp.up_proj"))
            layer.down.weight.copy_(of("mlp.down_proj"))
            for norm, name in zip((layer.norm1, layer.norm2, layer.norm3, layer.norm4),
                                  ("input_layernorm", "input_layernorm_2", "post_attention_layernorm",
                                   "post_attention_layernorm_2")):
                norm.weight.copy_(of(name))
    matrices = [p for n, p in model.named_parameters() if p.dim() > 1 and not n.startswith("gate.")]
    others = [p for n, p in model.named_parameters() if p.dim() <= 1 or n.startswith("gate.")]
    groups = [{"params": matrices, "weight_decay": case["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=case["lr"], betas=tuple(case["betas"]), eps=case["eps"], fused=True)
    batches = case["batches"]

    def step():
        """As a trainer does it: token ids become a batch, micro-batches add up, one clipped update."""
        packed = [Batch(b) for b in batches]
        counted = sum(int((b.targets >= 0).sum()) for b in packed)
        optimizer.zero_grad(set_to_none=False)
        total = 0.0
        for batch in packed:
            loss = model.loss(batch) / counted
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), case["clip"])
        optimizer.step()
        return total

    # Lists of Python integers to tensors is no part of a step.
    for b in batches:
        for key in ("input_ids", "targets", "positions"):
            b[key] = torch.tensor(b[key])
    return step


def serve(folder, recompute, threads):
    import warnings

    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    step = build(folder, recompute)
    print(json.dumps({"ready": torch.__version__}), flush=True)
    for _ in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        loss = step()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "loss": loss}), flush=True)


class Server:
    """A process that takes a step for each line it is given."""

    def __init__(self, command, env=None):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
                                        env={"OMP_WAIT_POLICY": "passive", **os.environ, **(env or {})})
        self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"bench_torch: {self.process.args[:2]} ended")
        return json.loads(line)

    def step(self):
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def compare(step_binary, python, cases, modes, threads, seconds):
    """Pairs of steps in turn; rows with the median of the pairs' ratios ours / PyTorch's (below 1: ours is faster)."""
    for case in cases:
        for mode in modes:
            for count in threads:
                with tempfile.TemporaryDirectory() as folder:
                    ours = Server([step_binary, "serve", case, mode, str(count), folder])
                    sides = {"ours": ours}
                    for way in ("rows", "documents"):
                        command = [python, __file__, "serve", folder, mode, str(count)]
                        sides[way] = Server(command, {"ATTENTION": way, "OMP_NUM_THREADS": str(count)})
                    first = {name: side.step()["loss"] for name, side in sides.items()}
                    wall, cpu, last = {n: [] for n in sides}, {n: [] for n in sides}, {}
                    until = time.monotonic() + seconds
                    while time.monotonic() < until or len(cpu["ours"]) < 5:
                        for name, side in sides.items():
                            answer = side.step()
                            wall[name].append(answer["seconds"])
                            cpu[name].append(answer["cpu_seconds"])
                            last[name] = answer["loss"]
                    for side in sides.values():
                        side.close()
                    batches = json.loads((Path(folder) / "case.json").read_text())["batches"]
                tokens = sum(len(b["input_ids"]) for b in batches)
                best = min(("rows", "documents"), key=lambda name: statistics.median(cpu[name]))
                ratios = lambda seconds: sorted(a / b for a, b in zip(seconds["ours"], seconds[best]))
                off = lambda loss: abs(loss["ours"] / loss[best] - 1)
                yield {
                    "bench": "worker/step/eager", "case": case, "recompute": mode, "threads": count,
                    "pairs": len(cpu["ours"]), "torch_attention": best,
                    "ours_tokens_per_cpu_second": tokens / statistics.median(cpu["ours"]),
                    "torch_tokens_per_cpu_second": tokens / statistics.median(cpu[best]),
                    "ours_tokens_per_second": tokens / statistics.median(wall["ours"]),
                    "torch_tokens_per_second": tokens / statistics.median(wall[best]),
                    "cpu_ratio": statistics.median(ratios(cpu)), "wall_ratio": statistics.median(ratios(wall)),
                    "cpu_ratio_of_minima": min(cpu["ours"]) / min(cpu[best]),
                    "wall_ratio_of_minima": min(wall["ours"]) / min(wall[best]),
                    "first_loss_off": off(first), "last_loss_off": off(last),
                }


def main():
    if sys.argv[1:2] == ["serve"]:
        folder, recompute, threads = sys.argv[2:]
        return serve(Path(folder), recompute, int(threads))
    import argparse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", required=True, help="the program of worker/benches/step.rs")
    parser.add_argument("--cases", default="tiny-128,tiny-512,d256")
    parser.add_argument("--modes", default="none,layer")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--seconds", type=float, default=20, help="for each row, after the first step")
    a = parser.parse_args()
    threads = [int(n) for n in a.threads.split(",")]
    for row in compare(a.step, sys.executable, a.cases.split(","), a.modes.split(","), threads, a.seconds):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
