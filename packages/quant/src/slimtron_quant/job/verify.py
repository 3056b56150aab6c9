"""Check an export from its files alone."""

from __future__ import annotations

import tempfile
from pathlib import Path

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.checkpoint.base import load_tokenizer
from slimtron_common.data import token_dataset
from slimtron_common.data.config import DataConfig
from slimtron_common.evaluation import Evaluation, evaluate
from slimtron_common.manifest import MANIFEST_NAME, verify_manifest
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import initialize_parallel
from slimtron_common.report import Column, Comparison, Number
from slimtron_quant.export.kinds import open_export
from slimtron_quant.formats.kv_cache import describe_kv_cache

__all__ = ["verify_directory"]


def verify_directory(
    directory: Path, *, against: str | None, source: str, num_tokens: int, seq_length: int
) -> Comparison:
    """Reads every file and tensor of an export, builds the model from them and runs it.

    Args:
        directory: The export.
        against: The original's spec, to measure the distance to; or None.
        source: Text to measure on.
        num_tokens: Tokens of it.
        seq_length: Tokens in a sequence.

    Returns:
        What was measured, the original first if there is one.

    Raises:
        CheckpointError: A file or tensor is missing, changed, or not as its layout says.
    """
    if (directory / MANIFEST_NAME).is_file():
        verify_manifest(directory)
    exported = open_export(directory)
    exported.check_values()
    original = None if against is None else open_checkpoint(against, where="--against")
    data = DataConfig(source=source, num_tokens=num_tokens, seq_length=seq_length)
    batches = token_dataset(data, load_tokenizer(exported.tokenizer_path)).batches(1)
    vocab_size = exported.architecture.vocab_size
    columns = []
    with initialize_parallel() as context, tempfile.TemporaryDirectory() as folder:
        dtype = exported.compute_dtype(context.device)
        references = {}
        if original is not None:
            model = build_model(original.architecture, context, dtype=dtype)
            original.load(model, context)
            recorded = Path(folder)
            found = evaluate(model, batches, context, vocab_size=vocab_size, record=recorded)
            references["original"] = recorded
            size = original.weight_bytes
            columns.append(_column("original", found, size, size * 8 / original.num_parameters))
            del model
        found = evaluate(
            exported.build(context, dtype=dtype),
            batches,
            context,
            vocab_size=vocab_size,
            references=references,
        )
    columns.append(_column("exported", found, exported.weight_bytes, exported.bits_per_weight))
    return Comparison(
        title=f"{directory.name}, reloaded",
        columns=tuple(columns),
        facts={
            "Formats": exported.describe(),
            "KV cache": describe_kv_cache(
                exported.kv_cache, exported.architecture, exported.dtype.itemsize
            ),
            "Measured on": f"{source}: {num_tokens} tokens in sequences of {seq_length}",
        },
    )


def _column(name: str, found: Evaluation, num_bytes: int, bits: float) -> Column:
    metrics: dict[str, Number] = {
        "weight_bytes": num_bytes,
        "bits_per_weight": bits,
        "perplexity": found.perplexity,
        "loss": found.loss,
        "num_tokens": found.num_tokens,
    }
    if "original" in found.distances:
        metrics.update(
            kl=found.distances["original"].kl, agreement=found.distances["original"].agreement
        )
    return Column(name, metrics)
