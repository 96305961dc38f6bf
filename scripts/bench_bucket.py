"""The share of its time that a run waits for data in a bucket that is far away.

    bench_bucket.py --anello PROGRAM [--steps N]

The tiny preset trains N steps on shards in an S3 server (moto, see `scripts/s3-venv`) behind a proxy that lets no answer begin
before 50 ms and lets 200 Mbit/s through in all. The row is seconds of data by seconds of steps, of the run's own metrics,
from the second step on: before the first nothing can have been fetched ahead.
"""

import argparse
import csv
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LATENCY, RATE = 0.050, 200e6 / 8


class Link:
    """Bytes that pass in all directions and connections together, at RATE bytes a second."""

    def __init__(self):
        self.lock, self.free_at = threading.Lock(), 0.0

    def carry(self, count):
        with self.lock:
            self.free_at = max(self.free_at, time.monotonic()) + count / RATE
            at = self.free_at
        time.sleep(max(0.0, at - time.monotonic()))


def relay(source, target, link, delay):
    try:
        waiting = True
        while data := source.recv(1 << 16):
            # The first bytes of an answer come when the latency is over; so do those of every request on the connection.
            if delay and waiting:
                time.sleep(LATENCY)
            waiting = len(data) < 1 << 16
            link.carry(len(data))
            target.sendall(data)
    except OSError:
        pass
    finally:
        for end in (source, target):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


def proxy(upstream, link):
    listener = socket.create_server(("127.0.0.1", 0))

    def accept():
        while True:
            client, _ = listener.accept()
            server = socket.create_connection(("127.0.0.1", upstream))
            threading.Thread(target=relay, args=(client, server, link, True), daemon=True).start()
            threading.Thread(target=relay, args=(server, client, link, False), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return listener.getsockname()[1]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--anello", required=True)
    parser.add_argument("--steps", default="60")
    arguments = parser.parse_args()
    subprocess.run([ROOT / "scripts" / "s3-venv"], check=True, stdout=sys.stderr)
    upstream = free_port()
    log = open(ROOT / "target" / "bench-s3.log", "w")
    server = subprocess.Popen([ROOT / ".venv-s3" / "bin" / "moto_server", "-H", "127.0.0.1", "-p", str(upstream)], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{upstream}/bench", method="PUT")).read()
                break
            except OSError:
                if time.monotonic() > deadline:
                    sys.exit("bench: the S3 server does not come up; see target/bench-s3.log")
                time.sleep(0.1)
        measure(arguments, upstream)
    finally:
        server.terminate()
        server.wait()


def measure(arguments, upstream):
    def anello(port, *words):
        environment = {**os.environ, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "bench",
                       "AWS_SECRET_ACCESS_KEY": "bench", "AWS_REGION": "us-east-1"}
        done = subprocess.run([arguments.anello, *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            sys.exit(f"bench: anello {' '.join(words)} failed: {done.stderr}")
        return done.stdout

    sets = []
    for source in ("docs", "code"):
        anello(upstream, "data", "tokenize", f"data/tiny/raw/{source}", "--tokenizer", "data/tiny/tokenizer.json",
               "--out", f"s3://bench/{source}", "--row-group", "32Ki", "--shard", "1MiB")
        sets += ["--set", f"data.sources.{source}.url=s3://bench/{source}"]
    far = proxy(upstream, Link())
    began = time.monotonic()
    anello(far, "data", "verify", "s3://bench/code")
    reading = time.monotonic() - began
    with tempfile.TemporaryDirectory(prefix="anello-bench-") as folder:
        anello(far, "run", "tiny", "--out", f"{folder}/run", "--until", arguments.steps, "--sample", "0", *sets)
        rows = list(csv.DictReader(io.StringIO(anello(far, "metrics", f"{folder}/run", "--csv"))))
    seconds = lambda name, rows: sum(float(row[name]) for row in rows)
    print(json.dumps({
        "bench": "data/bucket", "steps": len(rows), "data_share": seconds("data_s", rows[1:]) / seconds("step_s", rows[1:]),
        "first_step_data_seconds": seconds("data_s", rows[:1]), "step_seconds": seconds("step_s", rows[1:]) / (len(rows) - 1),
        "verify_seconds": reading,
    }), flush=True)


if __name__ == "__main__":
    main()
