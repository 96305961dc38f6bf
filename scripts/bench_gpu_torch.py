"""Steps of ouro-1.4b in PyTorch on one GPU, as `scripts/gpu-check` compares them with Anello's: T = 4, S = 4096, bf16 matrices
over fp32 weights, the loss of all loop steps by chunks, fused AdamW. Each layer is recomputed at each loop step (`layer`), or none is.

    bench_gpu_torch.py eager|compile [--recompute layer|none] [--micro SEQUENCES] [--dry-run]

Written as a good PyTorch user would: fused qkv and gate/up projections, native RMSNorm and SiLU, causal flash attention,
`torch.utils.checkpoint` around each layer, the logits of 1024 tokens at a time (recomputed in the backward), foreach clip. With
`compile` the layer and the loss of a chunk are compiled (`torch.compile`). Prints one JSON object: tokens_per_second of the
steps after the first two, and the last loss.
"""

import argparse
import json
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
arguments.add_argument("how", choices=("eager", "compile"))
arguments.add_argument("--recompute", choices=("layer", "none"), default="layer")
arguments.add_argument("--micro", type=int, default=2, help="sequences of a micro-batch")
arguments.add_argument("--dry-run", action="store_true")
OPTIONS = arguments.parse_args()
DRY = OPTIONS.dry_run
DEVICE = "cpu" if DRY else "cuda"
D, HEADS, FFN, LAYERS, VOCAB, S = (64, 4, 176, 2, 128, 128) if DRY else (2048, 16, 5632, 24, 49152, 4096)
LOOPS, BETA, ROWS, MICRO, CHUNK, STEPS = 4, 0.05, 8, OPTIONS.micro, 1024, 4 if DRY else 5
HALF = torch.bfloat16


class Linear(nn.Linear):
    """fp32 weights, bf16 products."""

    def forward(self, x):
        return F.linear(x, self.weight.to(HALF))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = Linear(D, 3 * D, bias=False), Linear(D, D, bias=False)
        self.gate_up, self.down = Linear(D, 2 * FFN, bias=False), Linear(FFN, D, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(D, 1e-6) for _ in range(4))

    def norm(self, index, x):
        return self.norms[index](x.float()).to(HALF)

    def forward(self, h, cos, sin):
        b, s, _ = h.shape
        q, k, v = self.qkv(self.norm(0, h)).view(b, s, 3, HEADS, D // HEADS).unbind(2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mixed = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
        h = h + self.norm(1, self.out(mixed.transpose(1, 2).reshape(b, s, D)))
        gate, up = self.gate_up(self.norm(2, h)).chunk(2, -1)
        return h + self.norm(3, self.down(F.silu(gate) * up))


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class LoopLM(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, D)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(D, 1e-6)
        self.lm_head, self.gate = Linear(D, VOCAB, bias=False), nn.Linear(D, 1)
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)
        half = D // HEADS // 2
        angles = torch.outer(torch.arange(S).float(), 10_000.0 ** (-torch.arange(half).float() / half))
        for name, of in (("cos", torch.cos), ("sin", torch.sin)):
            self.register_buffer(name, of(angles)[None, :, None, :].to(HALF))
        self.chunk = torch.compile(self.chunk_loss) if how == "compile" else self.chunk_loss
        if how == "compile":
            for layer in self.layers:
                layer.compile()

    def chunk_loss(self, h_tcd, targets):
        gate = self.gate(h_tcd.float()).squeeze(-1)
        survival = F.logsigmoid(-gate[:-1]).cumsum(0)
        before = torch.cat([torch.zeros_like(survival[:1]), survival])
        log_exit = torch.cat([F.logsigmoid(gate[:-1]), torch.zeros_like(gate[:1])]) + before
        losses = torch.stack([F.cross_entropy(self.lm_head(h).float(), targets, reduction="none") for h in h_tcd])
        exit = log_exit.exp()
        return ((exit * losses).sum(0) + BETA * (exit * log_exit).sum(0)).sum()

    def forward(self, ids, targets):
        h, hidden = self.embed(ids).to(HALF), []
        for _ in range(LOOPS):
            for layer in self.layers:
                if OPTIONS.recompute == "layer":
                    h = checkpoint(layer, h, self.cos, self.sin, use_reentrant=False)
                else:
                    h = layer(h, self.cos, self.sin)
            h = self.norm(h.float()).to(HALF)
            hidden.append(h.flatten(0, 1))
        hidden = torch.stack(hidden)
        parts = zip(hidden.split(CHUNK, 1), targets.flatten().split(CHUNK))
        return sum(checkpoint(self.chunk, h, t, use_reentrant=False) for h, t in parts)


def main():
    how = OPTIONS.how
    torch.manual_seed(0)
    model = LoopLM(how).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, (0.9, 0.95), 1e-8, 0.1, fused=True)
    ids = torch.randint(VOCAB, (ROWS, S + 1), device=DEVICE)
    times = []
    for _ in range(STEPS):
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for rows in ids.split(MICRO):
            loss = model(rows[:, :-1], rows[:, 1:]) / (ROWS * S)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        total = float(total)
        times.append(time.perf_counter() - began)
    steady = times[2:]
    print(json.dumps({"how": how, "tokens_per_second": ROWS * S * len(steady) / sum(steady), "loss": total}))


if __name__ == "__main__":
    main()
