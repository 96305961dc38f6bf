"""The ring against gloo: the same buffer, the same number of processes, step by step in turn.

    bench_ring.py gloo RANK MEMBERS MIB HOST PORT    a member that takes an all_reduce for each line it reads
    bench_ring.py --ring PROGRAM                     the comparison: PROGRAM is that of `worker/collective/benches/ring.rs`
    bench_ring.py --step PROGRAM                     a step of two workers: that of `worker/benches/ring_step.rs`
    bench_ring.py wire SPACE...                      a cable of 0.2 ms between network namespaces, until standard input ends

Ours is `reduce_scatter` + `all_gather`, with checksums and in the fixed order over lanes; gloo's is `all_reduce`, which
promises neither. A step takes as long as its slowest member; CPU time is that of all members. Over loopback, and, where
one may make network namespaces, over a link of 10 Gbit/s between two of them, and over one of 10 Gbit/s to each of all
members with 0.2 ms on the way. Kernels that have no netem delay no packet: there a process carries them between TUN devices,
on the same cores as the members, so that the wire itself may be what limits both sides.
"""

import argparse
import collections
import ctypes
import fcntl
import json
import os
import select
import socket
import statistics
import struct
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# On the way from one member to another, seconds.
DELAY = 0.0002


def gloo(rank, members, mib, host, port):
    import warnings

    warnings.simplefilter("ignore")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://{host}:{port}", rank=rank, world_size=members)
    lane = (torch.arange(mib << 18) % 1000) * 1e-3
    total = torch.empty_like(lane)
    dist.barrier()
    print(json.dumps({"ready": torch.__version__}), flush=True)
    for _ in sys.stdin:
        # A fresh gradient, as after a backward: outside the clock.
        total.copy_(lane)
        dist.barrier()
        start, cpu = time.perf_counter(), time.process_time()
        dist.all_reduce(total)
        answer = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu, "last": total[-1].item()}
        print(json.dumps(answer), flush=True)


class Loopback:
    """All members on one host."""

    name, interface = "loopback", "lo"

    def host(self, rank):
        return "127.0.0.1"

    def within(self, rank):
        return []

    def close(self):
        pass


class Link:
    """Two namespaces and a link between them that carries 10 Gbit/s each way."""

    name, interface = "10 Gbit/s", "ring"

    def __init__(self):
        self.spaces = [f"anello-{os.getpid()}-{rank}" for rank in range(2)]
        ip = lambda *words: subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
        try:
            for space in self.spaces:
                ip("netns", "add", space)
            ends = [("name", self.interface, "netns", space) for space in self.spaces]
            ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
            for rank, space in enumerate(self.spaces):
                ip("-n", space, "address", "add", f"{self.host(rank)}/24", "dev", self.interface)
                ip("-n", space, "link", "set", "lo", "up")
                ip("-n", space, "link", "set", self.interface, "up")
                subprocess.run(["ip", "netns", "exec", space, "tc", "qdisc", "add", "dev", self.interface, "root", "tbf",
                                "rate", "10gbit", "burst", "5mb", "latency", "5ms"], check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            self.close()
            raise RuntimeError(getattr(error, "stderr", "") or str(error)) from error

    def host(self, rank):
        return f"10.213.0.{rank + 1}"

    def within(self, rank):
        return ["ip", "netns", "exec", self.spaces[rank]]

    def close(self):
        for space in self.spaces:
            subprocess.run(["ip", "netns", "delete", space], capture_output=True)


def wire(spaces):
    """Carries whole TCP segments (virtio headers, offloads left undone) between the TUN devices of these namespaces: each
    packet arrives DELAY after it was taken."""
    set_iff, set_offload, set_namespace = 0x400454CA, 0x400454D0, 0x40000000
    tun, no_packet_info, vnet_header, checksum, tso4 = 0x1, 0x1000, 0x4000, 1, 2
    libc = ctypes.CDLL(None, use_errno=True)
    ends = []
    for space in spaces:
        with open(f"/var/run/netns/{space}") as namespace:
            if libc.setns(namespace.fileno(), set_namespace):
                raise OSError(ctypes.get_errno(), "setns")
        end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(end, set_iff, struct.pack("16sH22x", Wire.interface.encode(), tun | no_packet_info | vnet_header))
        fcntl.ioctl(end, set_offload, checksum | tso4)
        ends.append(end)
    print("ready", flush=True)
    under_way = collections.deque()
    while True:
        wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        ready, _, _ = select.select([*ends, 0], [], [], wait)
        if 0 in ready:
            return
        for end in ready:
            for _ in range(8):
                try:
                    packet = os.read(end, 1 << 17)
                except BlockingIOError:
                    break
                # A header of 10 bytes, and IPv4, whose destination ends with the number of the end.
                if packet[10] >> 4 == 4 and 1 <= packet[29] <= len(ends):
                    under_way.append((time.monotonic() + DELAY, ends[packet[29] - 1], packet))
        now = time.monotonic()
        while under_way and under_way[0][0] <= now:
            _, to, packet = under_way.popleft()
            os.write(to, packet)


class Wire:
    """A namespace for each member, and a wire of 10 Gbit/s and 0.2 ms to each."""

    name, interface = "10 Gbit/s, 0.2 ms", "wire"

    def __init__(self, members):
        self.spaces = [f"anello-{os.getpid()}-wire-{rank}" for rank in range(members)]
        self.carrier = None
        run = lambda *words: subprocess.run(words, check=True, capture_output=True, text=True)
        try:
            for space in self.spaces:
                run("ip", "netns", "add", space)
            self.carrier = subprocess.Popen([sys.executable, __file__, "wire", *self.spaces], stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            if not self.carrier.stdout.readline():
                raise RuntimeError(self.carrier.stderr.read())
            for rank, space in enumerate(self.spaces):
                run("ip", "-n", space, "address", "add", f"{self.host(rank)}/24", "dev", self.interface)
                run("ip", "-n", space, "link", "set", "lo", "up")
                run("ip", "-n", space, "link", "set", self.interface, "txqueuelen", "20000", "up")
                run("ip", "netns", "exec", space, "tc", "qdisc", "add", "dev", self.interface, "root", "tbf",
                    "rate", "10gbit", "burst", "1mb", "latency", "20ms")
        except (OSError, subprocess.CalledProcessError) as error:
            self.close()
            raise RuntimeError(getattr(error, "stderr", "") or str(error)) from error
        except RuntimeError:
            self.close()
            raise

    def host(self, rank):
        return f"10.213.1.{rank + 1}"

    def within(self, rank):
        return ["ip", "netns", "exec", self.spaces[rank]]

    def close(self):
        if self.carrier:
            self.carrier.stdin.close()
            self.carrier.wait()
        for space in self.spaces:
            subprocess.run(["ip", "netns", "delete", space], capture_output=True)


class Members:
    """The processes of one side."""

    def __init__(self, net, commands):
        environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": net.interface, **os.environ}
        self.all = [subprocess.Popen([str(part) for part in (*net.within(rank), *command)], stdin=subprocess.PIPE,
                                     stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
                    for rank, command in enumerate(commands)]

    def tell(self, line):
        for process in self.all:
            process.stdin.write(line + "\n")
            process.stdin.flush()

    def answers(self):
        lines = [process.stdout.readline() for process in self.all]
        if not all(lines):
            sys.exit("bench_ring: a member ended")
        return [json.loads(line) for line in lines]

    def step(self):
        self.tell("step")
        answers = self.answers()
        return {"seconds": max(a["seconds"] for a in answers), "cpu_seconds": sum(a["cpu_seconds"] for a in answers),
                "last": answers[0]["last"], "reduce_seconds": max(a.get("reduce_seconds", 0) for a in answers)}

    def close(self):
        for process in self.all:
            process.stdin.close()
        for process in self.all:
            process.wait()


def compare(net, ring, members, mib, seconds):
    ours = Members(net, [[ring, "serve", rank, members, mib, net.host(rank)] for rank in range(members)])
    ours.tell(json.dumps([answer["address"] for answer in ours.answers()]))
    ours.answers()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    theirs = Members(net, [[sys.executable, __file__, "gloo", rank, members, mib, net.host(0), port] for rank in range(members)])
    theirs.answers()
    first = ours.step()["last"], theirs.step()["last"]
    assert abs(first[0] - first[1]) < 1e-4, first
    steps = {"ours": [], "gloo": []}
    until = time.monotonic() + seconds
    while time.monotonic() < until or len(steps["gloo"]) < 5:
        steps["ours"].append(ours.step())
        steps["gloo"].append(theirs.step())
    ours.close()
    theirs.close()
    of = lambda side, key: [step[key] for step in steps[side]]
    ratio = lambda key: statistics.median(a / b for a, b in zip(of("ours", key), of("gloo", key)))
    return {
        "bench": "collective/ring", "net": net.name, "members": members, "mib": mib, "pairs": len(steps["ours"]),
        "ours_seconds": statistics.median(of("ours", "seconds")), "gloo_seconds": statistics.median(of("gloo", "seconds")),
        "ours_reduce_seconds": statistics.median(of("ours", "reduce_seconds")),
        "ours_cpu_seconds": statistics.median(of("ours", "cpu_seconds")),
        "gloo_cpu_seconds": statistics.median(of("gloo", "cpu_seconds")),
        "wall_ratio": ratio("seconds"), "cpu_ratio": ratio("cpu_seconds"),
        "wall_ratio_of_minima": min(of("ours", "seconds")) / min(of("gloo", "seconds")),
    }


def step_costs(net, program, seconds):
    """What a step of two workers costs beyond the compute of each half and the transfer that nothing can hide: that of
    the blocks that are whole only at the end, and the gather."""
    members = Members(net, [[program, "serve", rank, 2, net.host(rank)] for rank in range(2)])
    members.tell(json.dumps([answer["address"] for answer in members.answers()]))
    ready = members.answers()[0]
    taken = {"compute": [], "ring": [], "apart": [], "transfer": []}
    until = time.monotonic() + seconds
    while time.monotonic() < until or len(taken["ring"]) < 6:
        for kind, answers in taken.items():
            members.tell(kind)
            answers.append(members.answers())
    members.close()
    rounds = lambda kind, key: [max(answer[key] for answer in answers) for answers in taken[kind][1:]]
    reduce, gather = (statistics.median(rounds("transfer", key)) for key in ("reduce_seconds", "gather_seconds"))
    bare = reduce * ready["whole_at_the_end"] + gather
    over = lambda kind: statistics.median(
        step / (compute + bare) for step, compute in zip(rounds(kind, "seconds"), rounds("compute", "seconds")))
    return {
        "bench": "worker/ring_step", "net": net.name, "mib": ready["mib"], "rounds": len(taken["ring"]) - 1,
        "compute_seconds": statistics.median(rounds("compute", "seconds")), "step_seconds": statistics.median(rounds("ring", "seconds")),
        "reduce_seconds": reduce, "gather_seconds": gather, "bare_seconds": bare,
        "ratio": over("ring"), "ratio_apart": over("apart"),
    }


def main():
    if sys.argv[1:2] == ["wire"]:
        return wire(sys.argv[2:])
    if sys.argv[1:2] == ["gloo"]:
        rank, members, mib, host, port = sys.argv[2:]
        return gloo(int(rank), int(members), int(mib), host, int(port))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--ring", help="the program of worker/collective/benches/ring.rs")
    what.add_argument("--step", help="the program of worker/benches/ring_step.rs")
    parser.add_argument("--members", default="2,4")
    parser.add_argument("--mib", type=int, default=256, help="size of the buffer, fp32")
    parser.add_argument("--seconds", type=float, default=20, help="for each row")
    a = parser.parse_args()
    if a.ring:
        bench, counts = "collective/ring", [int(count) for count in a.members.split(",")]
        row = lambda net, members: compare(net, a.ring, members, a.mib, a.seconds)
    else:
        bench, counts = "worker/ring_step", [2]
        row = lambda net, members: step_costs(net, a.step, a.seconds)
    nets = [(Loopback, members) for members in counts] + [(Link, 2)] + [(Wire, members) for members in counts]
    for make, members in nets:
        try:
            net = make() if make is not Wire else Wire(members)
        except RuntimeError as error:
            told = {"bench": bench, "net": make.name, "members": members, "skipped": str(error).strip()}
            print(json.dumps(told), flush=True)
            continue
        try:
            print(json.dumps(row(net, members)), flush=True)
        finally:
            net.close()


if __name__ == "__main__":
    main()
