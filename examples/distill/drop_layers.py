"""Writes a copy of a Hugging Face model without some of its layers.

Run it as: python drop_layers.py smollm2 student 24 25 26 27
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Reads the arguments and writes the copy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a directory with config.json")
    parser.add_argument("out", type=Path, help="the directory to write")
    parser.add_argument("layers", type=int, nargs="+", help="layers to leave out, from 0")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    kept = [layer for i, layer in enumerate(model.model.layers) if i not in args.layers]
    model.model.layers = nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[: len(kept)]
    model.save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)
    print(f"{args.out}: {len(kept)} layers, {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
