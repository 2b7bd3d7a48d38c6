"""A column of text of a parquet file, batch by batch, through pyarrow.

In: a path and a column's name. Out: batches of texts as the bytes and borders that Arrow keeps them in. Called by the
core's binding (`rust/py/src/inputs.rs`), from the threads that count; pyarrow is imported only here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bytekiln.errors import FormatError, MissingExtraError

BATCH_BYTES = 1 << 20
"""Text that is asked for at a time, by the file's own account of how long its texts are."""
PAGE_BYTES = 256 << 10
"""Of the file that are read at a time."""
MOST_ROWS = 8192
"""Rows of a batch at most: that account may be too low where texts repeat."""


class Column:
    """A column that is being read.

    Attributes:
        num_rows: of the file.
    """

    def __init__(self, path: str, field: str) -> None:
        """Open the file and find the column.

        Raises:
            MissingExtraError: pyarrow is not installed.
            FormatError: no parquet, a damaged one, no such column, or one that holds no text.
        """
        try:
            import pyarrow  # type: ignore[import-untyped]
            import pyarrow.parquet  # type: ignore[import-untyped]
        except ImportError:
            raise MissingExtraError(f'{path}: pyarrow reads parquet; expected pip install "bytekiln[data]"') from None
        self._path, self._field, self._seen = path, field, 0
        self._damage = (pyarrow.ArrowException, OSError)
        self._text = pyarrow.large_string()
        try:
            # With a buffer a column is read page by page; without one, all of it in a row group at once.
            file = pyarrow.parquet.ParquetFile(path, buffer_size=PAGE_BYTES, pre_buffer=False)
            schema = file.schema_arrow
        except self._damage as error:
            raise self._damaged(error) from None
        if field not in schema.names:
            columns = ", ".join(schema.names) or "none"
            raise FormatError(
                f"{path}: no column {field!r} among {columns}; expected one of text (--field names another)"
            )
        kind = schema.field(field).type
        values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        is_text = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
        if not any(holds(values) for holds in is_text):
            raise FormatError(f"{path}: column {field!r} holds {kind}; expected text (--field names another)")
        self.num_rows: int = file.metadata.num_rows
        # Rows of a batch, so that it has about `BATCH_BYTES` of text.
        groups = map(file.metadata.row_group, range(self.num_rows and file.metadata.num_row_groups))
        chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
        size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema == field)
        rows = max(1, min(MOST_ROWS, BATCH_BYTES * self.num_rows // max(size, 1)))
        self._batches: Iterator[Any] = file.iter_batches(rows, columns=[field])

    def next(self) -> tuple[bytes, bytes] | None:
        """The next texts: their borders (int64, one more than texts) and the bytes between; None at the end.

        Raises:
            FormatError: damaged data, or a row without a text.
        """
        try:
            batch = next(self._batches, None)
            if batch is None:
                return None
            column = batch.column(0).cast(self._text)
        except self._damage as error:
            raise self._damaged(error) from None
        if column.null_count:
            row = self._seen + 1 + column.is_null().index(True).as_py()
            raise FormatError(
                f"{self._path}: row {row}: no text in column {self._field!r} (null); expected one in each row"
            )
        self._seen += len(column)
        _, borders, data = column.buffers()
        first = 8 * column.offset
        return bytes(memoryview(borders)[first : first + 8 * (len(column) + 1)]), bytes(data or b"")

    def _damaged(self, error: Exception) -> FormatError:
        said = "; ".join(line.strip() for line in str(error).splitlines())
        return FormatError(f"{self._path}: corrupt or truncated parquet ({said}); expected a whole file")
