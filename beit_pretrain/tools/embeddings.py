"""Files of features, written as they come: NumPy's .npz and Parquet."""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from beit_pretrain.checkpoint import files
from beit_pretrain.errors import ConfigError

BUFFER = 2**24  # bytes of features in a row group of Parquet, or copied at a time
Write = Callable[[Sequence[str], np.ndarray], None]  # names of files, and features (B, *shape) float32


@contextmanager
def npz(out: Path, shape: tuple[int, ...], facts: Mapping[str, Any]) -> Iterator[Write]:
    """Arrays `features` (n, *shape) float32 and `files` (n,), and one for each fact.

    An array begins with its length, which is not known before the last image: features wait in a nameless file beside
    `out`, so that memory holds no more than a batch of them, and the disk both for as long as one is copied.
    """
    names: list[str] = []
    with files.atomic(out) as file, tempfile.TemporaryFile(dir=out.parent) as features:

        def write(these: Sequence[str], values: np.ndarray) -> None:
            names.extend(these)
            features.write(np.ascontiguousarray(values, "<f4").data)

        yield write
        features.seek(0)
        with zipfile.ZipFile(file, "w") as archive:
            with _member(archive, "features", np.dtype("<f4"), (len(names), *shape)) as member:
                shutil.copyfileobj(features, member, BUFFER)
            letters = np.dtype(f"<U{max(map(len, names))}")
            with _member(archive, "files", letters, (len(names),)) as member:
                for name in names:  # all of them as one array would be as wide as the longest, in memory
                    member.write(np.array(name, letters).tobytes())
            for name, fact in facts.items():
                value = np.asarray(fact)
                with _member(archive, name, value.dtype, value.shape) as member:
                    member.write(value.tobytes())


@contextmanager
def _member(
    archive: zipfile.ZipFile, name: str, kind: np.dtype, shape: tuple[int, ...]
) -> Iterator[IO[bytes]]:
    """A file within an .npz, after its array's header."""
    header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, header)
        yield member


@contextmanager
def parquet(out: Path, shape: tuple[int, ...], facts: Mapping[str, Any]) -> Iterator[Write]:
    """Columns `file` and `feature`, lists of the fixed lengths `shape`; facts are metadata of the file."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    kind = pa.float32()
    for length in reversed(shape):
        kind = pa.list_(kind, length)
    about = {name: fact if isinstance(fact, str) else json.dumps(fact) for name, fact in facts.items()}
    schema = pa.schema([("file", pa.string()), ("feature", kind)], metadata=about)
    names: list[str] = []
    values: list[np.ndarray] = []

    # Dictionaries are for values that come again.
    with files.atomic(out) as file, ParquetWriter(file, schema, use_dictionary=False) as writer:

        def flush() -> None:
            column = pa.array(np.concatenate(values).reshape(-1))
            for length in reversed(shape):
                column = pa.FixedSizeListArray.from_arrays(column, length)
            writer.write_table(pa.Table.from_arrays([pa.array(names), column], schema=schema))
            names.clear()
            values.clear()

        def write(these: Sequence[str], more: np.ndarray) -> None:
            # A column of text is Unicode, which names of files need not be.
            names.extend(name.encode(errors="backslashreplace").decode() for name in these)
            values.append(more)
            if sum(part.nbytes for part in values) >= BUFFER:
                flush()

        yield write
        if names:
            flush()


WRITERS = {".npz": npz, ".parquet": parquet}


def check_ending(out: Path) -> None:
    """ConfigError for a file that cannot be written because of its kind."""
    if out.suffix not in WRITERS:
        raise ConfigError(f"--out {out}: set a name that ends with {' or '.join(WRITERS)}")
    if out.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"--out {out} needs pyarrow: pip install 'beit-pretrain[parquet]', or set a name that ends with .npz"
            ) from error
