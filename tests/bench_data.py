"""Tokens a second of a stage fed from a compressed file, beside those of rows tokenised before.

    python tests/bench_data.py
    python tests/bench_data.py --json nbs/results/data_throughput_cpu.json

Stage 1 of the bundled teacher reads text of a `.jsonl.zst`, made into rows in the training itself
or by two workers ahead of the step, and the same rows from a list. Ways take turns, and each
counts with its best round, as other programs may run beside. A file keeps all runs."""
import argparse
import json
import tempfile
from itertools import islice
from pathlib import Path

import torch
import zstandard

import flashmorph as fm
from flashmorph.data.stories import Stories

SETTINGS = {"length": 512, "shards": 2}


def write(path: Path, stories: int) -> Path:
    lines = "\n".join(json.dumps({"text": Stories(0)[i]}) for i in range(stories))
    path.write_bytes(zstandard.compress(lines.encode()))
    return path


def measure(data, steps: int, batch_size: int) -> float:
    "Tokens a second of stage 1, without its start."
    model = fm.morph(fm.load_teacher()[0])
    result = fm.align(model, data, steps=steps, batch_size=batch_size, start="copy",
                      optimizer="adamw", progress=False)
    return result.tokens_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stories", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    _, tokenizer = fm.load_teacher()
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "stories.jsonl.zst", args.stories)
        def stream(workers): return fm.text(tokenizer, path, workers=workers, **SETTINGS)
        rows = list(islice(stream(0), args.steps * args.batch_size))
        ways = {"tokenised before": lambda: rows, "no worker": lambda: stream(0),
                "two workers": lambda: stream(2)}
        rounds = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, data in ways.items():
                rounds[name].append(measure(data(), args.steps, args.batch_size))
    best = {name: max(found) for name, found in rounds.items()}
    for name, found in best.items():
        print(f"{name:16}  {found:8,.0f} tokens/s  {found / best['tokenised before']:.3f}")
    if args.json:
        record = {"what": "tokens/s of stage 1, bundled teacher, one thread; the best of rounds",
                  "settings": {**SETTINGS, "steps": args.steps, "batch_size": args.batch_size},
                  "file": f"{args.stories} stories as .jsonl.zst", "rounds": rounds, "best": best,
                  "share": {name: found / best["tokenised before"] for name, found in best.items()},
                  "versions": {"torch": torch.__version__}}
        before = json.loads(args.json.read_text()) if args.json.exists() else []
        args.json.write_text(json.dumps([*before, record], indent=1) + "\n")


if __name__ == "__main__": main()
