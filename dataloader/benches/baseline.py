"""What `throughput.rs` measures, done in Python on the same shards: Parquet to packed [B, S] numpy arrays.

    python baseline.py SET [--ours TOKENS_PER_CORE_SECOND] [--json]

SET is the folder that `throughput --set SET` wrote. Every way fills the same three arrays as a `MicroBatch` has
(input_ids and targets int64, positions int32; the target of a document's last token is -100), in file order: none of
them shuffles, mixes or can be resumed. Rates are per second of CPU time of this process, all its threads together.

  datasets   `load_dataset("parquet", streaming=True)`, iterated row by row: what most training scripts do
  as_py      `ParquetFile.iter_batches`, each row's list as a Python list
  numpy      `ParquetFile.iter_batches`, each row a slice of the batch's values without a copy: the best that an expert
             writes with a loop over documents
"""

import argparse
import glob
import json
import os
import time

import numpy as np
import pyarrow.parquet as pq

SEQUENCES, SEQUENCE = 8, 4096


class Packer:
    """Documents to micro-batches, as `pack.rs` has it."""

    def __init__(self):
        self.batches = self.tokens = self.checksum = 0
        self.new()

    def new(self):
        self.ids = np.empty(SEQUENCES * SEQUENCE, np.int64)
        self.targets = np.empty(SEQUENCES * SEQUENCE, np.int64)
        self.positions = np.empty(SEQUENCES * SEQUENCE, np.int32)
        self.filled = 0

    def push(self, document):
        length, start = len(document), 0
        while start < length:
            at = self.filled
            take = min(SEQUENCE - at % SEQUENCE, length - start)
            end = start + take
            self.ids[at : at + take] = document[start:end]
            if end < length:
                self.targets[at : at + take] = document[start + 1 : end + 1]
            else:
                self.targets[at : at + take - 1] = document[start + 1 : end]
                self.targets[at + take - 1] = -100
            self.positions[at : at + take] = RANGE[:take]
            self.filled += take
            start = end
            if self.filled == SEQUENCES * SEQUENCE:
                self.finish()

    def finish(self):
        ids = self.ids.reshape(SEQUENCES, SEQUENCE)
        self.targets.reshape(SEQUENCES, SEQUENCE)
        self.positions.reshape(SEQUENCES, SEQUENCE)
        self.checksum += int(ids[0, 0])
        self.batches += 1
        self.tokens += self.filled
        self.new()


RANGE = np.arange(SEQUENCE, dtype=np.int32)


def through_datasets(files, packer):
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=files, split="train", streaming=True, columns=["input_ids"])
    for row in rows:
        packer.push(np.asarray(row["input_ids"]))


def through_as_py(files, packer):
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(columns=["input_ids"]):
            for row in batch.column(0):
                packer.push(np.asarray(row.as_py()))


def through_numpy(files, packer):
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(columns=["input_ids"]):
            column = batch.column(0)
            values, offsets = column.values.to_numpy(), column.offsets.to_numpy()
            for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist()):
                packer.push(values[start:end])


def measure(way, files, rounds):
    best = 0.0
    for _ in range(rounds):
        packer = Packer()
        start = time.process_time()
        way(files, packer)
        best = max(best, packer.tokens / (time.process_time() - start))
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set")
    parser.add_argument("--ours", type=float, help="tokens_per_core_second of throughput.rs in the same run")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    files = sorted(glob.glob(os.path.join(arguments.set, "*.parquet")))
    if not files:
        parser.error(f"{arguments.set} holds no .parquet file; run throughput with --set first")

    ways = {"datasets": through_datasets, "as_py": through_as_py, "numpy": through_numpy}
    rates = {}
    for name, way in ways.items():
        # The slow ways see fewer shards: a rate needs no more.
        few = name != "numpy"
        measure(way, files[:1], 1)
        rates[name] = measure(way, files[:2] if few else files, 2)
        ratio = f"   ours is {arguments.ours / rates[name]:6.1f} x" if arguments.ours else ""
        print(f"python {name:<25} {rates[name] / 1e6:>8.1f} M tokens/s a core{ratio}")
    if arguments.json:
        print(json.dumps({"bench": "dataloader/baseline", "tokens_per_core_second": rates}))


if __name__ == "__main__":
    main()
