"""Text sources: Python's help topics, files and Hugging Face datasets, read as streams.

A document comes as an iterator of pieces, so that one of any size is read and tokenized only as
far as it is needed.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import zlib
from collections.abc import Iterable, Iterator
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

from slimtron_common.errors import CheckpointError, ConfigError, MissingDependencyError

__all__ = ["check_source", "open_source"]

PIECE_LENGTH = 2**16
"""Characters of a document that are read, and tokenized, at a time."""

SHUFFLE_BUFFER = 2**26
"""Characters of documents that a shuffle holds at a time."""

_ALLOWED = (
    "pydoc, hf:NAME[,CONFIG][:SPLIT], or a file ending in .txt, .jsonl, .json (these also with "
    ".gz) or .parquet"
)

_DATASET = re.compile(r"hf:([^,:]+)(?:,([^,:]+))?(?::(.+))?")

# Byte-level tokenizers start a new token at a space between two letters, so a text that is cut
# just before such a space gives the same tokens as the whole.
_UP_TO_LAST_WORD = re.compile(r".*[^\W\d_](?= [^\W\d_])", re.DOTALL)

_Record = tuple[str, Any]
"""Where a record is, for messages, and the record: a mapping if all is well."""


def check_source(spec: str, *, text_field: str = "text") -> None:
    """Refuses early what `open_source` would refuse at its first document.

    A Hugging Face dataset is not asked for, as that may take minutes.

    Args:
        spec: As for `open_source`.
        text_field: As for `open_source`.

    Raises:
        CheckpointError: The file is missing, empty or not readable as what its name says.
        ConfigError: The source is of an unknown kind, or its first record lacks the text field.
        MissingDependencyError: A package that reads such a source is not installed.
    """
    documents = open_source(spec, text_field=text_field)
    if not spec.startswith("hf:"):
        for document in documents:
            next(document, None)
            return


def open_source(
    spec: str, *, text_field: str = "text", shuffle_seed: int | None = None
) -> Iterator[Iterator[str]]:
    """Opens a source of documents.

    The order of documents is that of the source (of their names for ``pydoc``), or random: drawn
    from a buffer of 64 Mi characters, the same for the same seed and source.

    Args:
        spec: ``pydoc``: the help topics of the running Python; a path ending in ``.txt`` (UTF-8,
            one document, any newline read as a line feed), ``.jsonl`` or ``.json`` (one object a
            line, blank lines skipped), each of them also with ``.gz``, or ``.parquet``; or
            ``hf:NAME[,CONFIG][:SPLIT]``, streamed, ``train`` if no split is given.
        text_field: The field of a record that holds the text.
        shuffle_seed: Shuffles documents.

    Returns:
        The documents, each an iterator of pieces that joined together are its text.

    Raises:
        CheckpointError: The source is missing, empty or damaged; where that shows only later,
            from the iterator.
        ConfigError: The source is of an unknown kind, or a record lacks the text field.
        MissingDependencyError: A package that reads such a source is not installed.
    """
    if spec == "pydoc":
        from pydoc_data.topics import topics

        return _split_all((topics[name] for name in sorted(topics)), shuffle_seed)
    if spec.startswith("hf:"):
        match = _DATASET.fullmatch(spec)
        if match is None:
            raise ConfigError("names no dataset", where=spec, allowed="hf:NAME[,CONFIG][:SPLIT]")
        records = _read_dataset(spec, _require("datasets"), *match.groups())
    else:
        path = Path(spec).expanduser()
        kind = _check_file(path, spec)
        if kind == ".txt":
            return iter([_split(_read_text(path))])
        if kind == ".parquet":
            records = _read_parquet(path, text_field, _require("pyarrow.parquet"))
        else:
            records = _read_json(path)
    return _split_all(_texts(records, spec, text_field), shuffle_seed)


def _check_file(path: Path, spec: str) -> str:
    """Returns the suffix that tells how to read a file, less ``.gz``."""
    if os.path.isdir(path):
        raise CheckpointError("is a directory", where=spec, allowed=_ALLOWED)
    name = path.name.lower()
    kind = Path(name.removesuffix(".gz")).suffix
    if kind not in (".txt", ".jsonl", ".json", ".parquet") or name.endswith(".parquet.gz"):
        raise ConfigError(
            "is not a known kind of text source",
            where=spec,
            allowed=_ALLOWED,
            hint=None if os.path.exists(path) else f"for a Hugging Face dataset: hf:{spec}",
        )
    try:
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        raise _not_readable(spec, error) from error
    if size == 0:
        raise CheckpointError("is empty", where=spec)
    return kind


def _texts(records: Iterator[_Record], spec: str, text_field: str) -> Iterator[str]:
    first = next(records, None)
    if first is None:
        raise CheckpointError("holds no documents", where=spec)
    for where, record in chain([first], records):
        if not isinstance(record, dict):
            raise CheckpointError(
                "is not an object",
                where=where,
                found=type(record).__name__,
                allowed=f'one object a line: {{"{text_field}": "..."}}',
            )
        if text_field not in record:
            raise ConfigError(
                f"has no field {text_field!r}",
                where=where,
                found=", ".join(record) or "no fields",
                hint="set text_field to the field that holds the text",
            )
        text = record[text_field]
        if not isinstance(text, str):
            raise CheckpointError(
                f"the field {text_field!r} is not text", where=where, found=type(text).__name__
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise CheckpointError(
                f"the field {text_field!r} holds half a surrogate pair",
                where=where,
                found=ascii(text[error.start]),
            ) from error
        yield text


def _split_all(texts: Iterable[str], shuffle_seed: int | None) -> Iterator[Iterator[str]]:
    if shuffle_seed is not None:
        texts = _shuffle(texts, shuffle_seed)
    for text in texts:
        yield _split(text[i : i + PIECE_LENGTH] for i in range(0, len(text), PIECE_LENGTH))


def _split(blocks: Iterable[str]) -> Iterator[str]:
    """Moves the ends of blocks back to their last word; one without words stays as it is."""
    text = ""
    for block in blocks:
        if text:
            match = _UP_TO_LAST_WORD.match(text)
            end = len(text) if match is None else match.end()
            yield text[:end]
            text = text[end:]
        text += block
    if text:
        yield text


def _shuffle(texts: Iterable[str], seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    buffer: list[str] = []
    size = 0
    for text in texts:
        buffer.append(text)
        size += len(text)
        while size > SHUFFLE_BUFFER:
            index = rng.randrange(len(buffer))
            buffer[index], buffer[-1] = buffer[-1], buffer[index]
            size -= len(buffer[-1])
            yield buffer.pop()
    rng.shuffle(buffer)
    yield from buffer


def _read_text(path: Path) -> Iterator[str]:
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            while block := file.read(PIECE_LENGTH):
                yield block
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error
    except (OSError, EOFError, zlib.error) as error:
        raise _not_readable(path, error) from error


def _read_json(path: Path) -> Iterator[_Record]:
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with cast(IO[bytes], opener(path, "rb")) as file:
            for number, line in enumerate(file, 1):
                where = f"{path}, line {number}"
                try:
                    text = line.decode("utf-8-sig")
                    if text.strip():
                        yield where, json.loads(text)
                except UnicodeDecodeError as error:
                    raise _not_utf8(where, error) from error
                except (ValueError, RecursionError) as error:
                    raise CheckpointError(
                        "is not JSON", where=where, found=error, allowed="one object a line"
                    ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise _not_readable(path, error) from error


def _read_parquet(path: Path, text_field: str, parquet: Any) -> Iterator[_Record]:
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            # Without that column the first row is read whole, to tell which there are.
            columns = [text_field] if text_field in file.schema_arrow.names else None
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    # Arrow's own errors are subclasses of these.
    except (OSError, ValueError, NotImplementedError) as error:
        raise _not_readable(path, error) from error


def _read_dataset(
    spec: str, datasets: Any, name: str, config: str | None, split: str | None
) -> Iterator[_Record]:
    try:
        rows = datasets.load_dataset(name, config, split=split or "train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield f"{spec}, row {number}", row
    # The hub, its cache and the readers of a dozen formats raise errors of all kinds.
    except Exception as error:
        raise _not_readable(spec, error) from error


def _require(module: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise MissingDependencyError(
            "reads such sources and is not installed",
            where=package,
            hint="pip install 'slimtron-common[data]'",
        ) from error


def _not_utf8(where: object, error: UnicodeDecodeError) -> CheckpointError:
    return CheckpointError(
        "is not UTF-8 text",
        where=where,
        found=f"byte 0x{error.object[error.start]:02x} ({error.reason})",
        hint="convert it: iconv -f LATIN1 -t UTF-8",
    )


def _not_readable(where: object, error: Exception) -> CheckpointError:
    found = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    return CheckpointError("cannot be read", where=where, found=found)
