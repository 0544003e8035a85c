"""Row groups of local or remote parquet files."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Features
from fsspec.core import url_to_fs

from hf_ddpm.utils.files import one_line
from hf_ddpm.utils.seeds import SUBSET, generator

# Number of threads that read footers; from a server, each footer needs one or two requests.
FOOTER_READERS = 16


@dataclass(frozen=True)
class RowGroup:
    """A row group of a parquet file.

    Attributes:
        path: Path or URL of the file, as given.
        number: Index of the group in the file.
        first_row: Row of the file at which the group starts.
        rows: The number of rows.
        footer: Metadata of the file.
    """

    path: str
    number: int
    first_row: int
    rows: int
    footer: pq.FileMetaData = field(repr=False, compare=False)

    def read(self, columns: list[str]) -> pa.Table:
        """Return the rows.

        Raises:
            ValueError: If they cannot be read; the message names file and group.
        """
        try:
            with _open(self.path, self.footer) as file:
                return file.read_row_group(self.number, columns=columns, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            reason = one_line(error)
            raise ValueError(f"row group {self.number} of {self.path!r}: cannot be read: {reason}") from error


class Shards:
    """The files of a split.

    Args:
        paths: Paths or URLs of parquet files with the same columns.

    Attributes:
        groups: The non-empty row groups, in order.
        features: The columns.

    Raises:
        ValueError: If a file cannot be read, the columns differ from the first file's, or there are no rows.
    """

    def __init__(self, paths: Sequence[str]):
        with ThreadPoolExecutor(FOOTER_READERS) as readers:
            footers = list(readers.map(_footer, paths))
        schema = footers[0].schema.to_arrow_schema()
        self.groups = []
        for path, footer in zip(paths, footers, strict=True):
            if footer.schema.to_arrow_schema().names != schema.names:
                raise ValueError(f"{path!r}: columns differ from the columns of {paths[0]!r}")
            first_row = 0
            for number in range(footer.num_row_groups):
                rows = footer.row_group(number).num_rows
                if rows:
                    self.groups.append(RowGroup(path, number, first_row, rows, footer))
                first_row += rows
        if not self.groups:
            raise ValueError(f"{paths[0]!r}: contains no images")
        self.features = Features.from_arrow_schema(schema)

    def some(self, max_rows: int | None, seed: int) -> list[RowGroup]:
        """Return the groups to use, in order: all, or random groups of `max_rows` rows; the last one may be cut."""
        left = sum(group.rows for group in self.groups) if max_rows is None else max_rows
        chosen: dict[int, RowGroup] = {}
        for number in torch.randperm(len(self.groups), generator=generator(seed, SUBSET)).tolist():
            if left > 0:
                chosen[number] = replace(self.groups[number], rows=min(self.groups[number].rows, left))
                left -= chosen[number].rows
        return [chosen[number] for number in sorted(chosen)]

    def values(self, column: str) -> Iterator[Any]:
        """Yield all values of a column, read lazily."""
        for group in self.groups:
            yield from group.read([column])[column].to_pylist()


def _footer(path: str) -> pq.FileMetaData:
    try:
        with _open(path) as file:
            return file.metadata
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path!r}: cannot be read as parquet: {one_line(error)}") from error


def _open(path: str, footer: pq.FileMetaData | None = None) -> pq.ParquetFile:
    files, name = url_to_fs(path)
    return pq.ParquetFile(name, metadata=footer, filesystem=files, pre_buffer=True)
