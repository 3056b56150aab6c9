"""Quantize with all of a model in memory and with one layer at a time; compare memory and bytes.

Every job is a process of its own, whose peak memory the system counts. `plan` in another process
shows what the libraries take.

    python benchmarks/layerwise.py hf:smollm2 --recipes fp8,int8_sq
    python benchmarks/layerwise.py deep --recipes fp8     # 48 layers, 0.6 billion random weights
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from slimtron_common.report import Comparison, read_report
from slimtron_common.testing import write_tiny_model

JOB_FILES = {"report.json", "report.html", "slimtron.json"}
DEEP = {
    "num_hidden_layers": 48,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "initializer_range": 0.02,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="KIND:DIR, or deep")
    parser.add_argument("--recipes", default="fp8", help="separated by commas")
    parser.add_argument("--eval-tokens", type=int, default=2048)
    parser.add_argument("--seq-len", type=int, default=512)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = args.model
        if model == "deep":
            # In a process of its own: the jobs would inherit this one's peak.
            context = multiprocessing.get_context("spawn")
            writer = context.Process(target=write_deep_model, args=(folder / "deep",))
            writer.start()
            writer.join()
            model = f"hf:{folder / 'deep'}"
        job = ["--model", model, "--data", "pydoc", "--block-size", "auto", "--calib-size", "4",
               "--calib-seq-len", str(args.seq_len), "--calib-batch-size", "1", "--eval-tokens",
               str(args.eval_tokens), "--eval-seq-len", str(args.seq_len)]  # fmt: skip
        libraries, _ = run("plan", *job, "--recipe", "fp8", "--out", str(folder / "none"))
        print(f"libraries alone: {libraries:.2f} GiB\n")
        print("| recipe | in memory | peak GiB | beside the libraries | planned | s | perplexity "
              "| files |")  # fmt: skip
        print("|---|---|---|---|---|---|---|---|")
        for recipe in args.recipes.split(","):
            written = []
            for title, more in (("all layers", ()), ("one layer", ("--layerwise",))):
                out = folder / f"{recipe}-{len(written)}"
                peak, seconds = run("run", *job, "--recipe", recipe, "--out", str(out), *more)
                report = read_report(out)
                written.append(digests(out))
                same = (
                    "" if len(written) == 1 else "equal" if written[0] == written[1] else "DIFFER"
                )
                print(f"| {recipe} | {title} | {peak:.2f} | {peak - libraries:.2f} | "
                      f"{planned(report)} | {seconds:.0f} | {perplexities(report)} | {same} |",
                      flush=True)  # fmt: skip


def write_deep_model(directory: Path) -> None:
    write_tiny_model(directory, dtype="bfloat16", **DEEP)


def run(*arguments: str) -> tuple[float, float]:
    """Runs the command; returns its peak memory in GiB (the GPU's, if it has one) and seconds."""
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "slimtron_quant", *arguments, "-q"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    shown = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, shown
    peak = usage.ru_maxrss / 2**20
    if torch.cuda.is_available():
        line = next((line for line in shown.splitlines() if line.startswith("memory ")), "memory 0")
        peak = float(line.split()[1])
    return peak, time.monotonic() - start


def digests(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.iterdir()
        if path.name not in JOB_FILES
    }


def planned(report: Comparison) -> str:
    return report.facts["Memory"].removeprefix("about ").partition(" ")[0]


def perplexities(report: Comparison) -> str:
    return ", ".join(f"{column.metrics['perplexity']:.6f}" for column in report.columns)


if __name__ == "__main__":
    main()
