"""A column of text of a parquet file, batch by batch, through pyarrow.

In: a path and a column's name. Out: parts of it as the bytes and borders that Arrow keeps them in. Called by the
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
"""Rows of a batch at most."""
DICTIONARY_BYTES = 2 << 20
"""A column with little more than so much, and some bytes a row, may consist of a few texts that repeat: its own account
of their lengths says nothing. It is read as those texts and their places."""
INDEX_BYTES = 4
"""Of the place of a text that repeats, at most."""


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
        chunks = [
            (group.num_rows, group.column(i).total_uncompressed_size)
            for group in groups
            for i in range(group.num_columns)
            if group.column(i).path_in_schema == field
        ]
        self._mean = max((size // max(rows, 1) for rows, size in chunks), default=0)
        size = sum(size for _, size in chunks)
        rows = max(1, min(MOST_ROWS, BATCH_BYTES * self.num_rows // max(size, 1)))
        if any(size <= DICTIONARY_BYTES + INDEX_BYTES * rows for rows, size in chunks):
            file = pyarrow.parquet.ParquetFile(
                path, buffer_size=PAGE_BYTES, pre_buffer=False, read_dictionary=[field], metadata=file.metadata
            )
        self._batches: Iterator[Any] = file.iter_batches(rows, columns=[field])
        self._parts: Iterator[Any] = iter(())

    def next(self, most: int) -> tuple[bytes, bytes] | None:
        """The next texts: their borders (int64, one more than texts) and the bytes between; None at the end.

        Args:
            most: bytes of a text at most; a longer one comes alone, for the caller to refuse.

        Raises:
            FormatError: damaged data, a row without a text, or texts that are surely longer than `most`.
        """
        # Twice: the account has more in it than the texts.
        if self._mean > 2 * most:
            raise FormatError(
                f"{self._path}: its texts have {self._mean:,} bytes on average in a group of rows; expected at most "
                f"{most:,}: shorter texts, or a larger --max-memory"
            )
        try:
            while (part := next(self._parts, None)) is None:
                if (batch := next(self._batches, None)) is None:
                    return None
                self._parts = self._split(batch.column(0))
            column = part.cast(self._text)
        except self._damage as error:
            raise self._damaged(error) from None
        _, borders, data = column.buffers()
        first, end = 8 * column.offset, 8 * (column.offset + len(column) + 1)
        return bytes(memoryview(borders)[first:end]), bytes(data or b"")

    def _split(self, column: Any) -> Iterator[Any]:  # noqa: ANN401 - pyarrow has no types
        """Parts of a batch of about `BATCH_BYTES`: rows that repeat a text are small until they are written out."""
        from pyarrow import DictionaryArray, compute

        if column.null_count:
            row = self._seen + 1 + column.is_null().index(True).as_py()
            raise FormatError(
                f"{self._path}: row {row}: no text in column {self._field!r} (null); expected one in each row"
            )
        self._seen += len(column)
        if not isinstance(column, DictionaryArray):
            yield column
            return
        start, size = 0, 0
        lengths = compute.binary_length(column.dictionary).take(column.indices).to_pylist()
        for row, length in enumerate(lengths):
            if size and size + length > BATCH_BYTES:
                yield column.slice(start, row - start)
                start, size = row, 0
            size += length
        yield column.slice(start)

    def _damaged(self, error: Exception) -> FormatError:
        said = "; ".join(line.strip() for line in str(error).splitlines())
        return FormatError(f"{self._path}: corrupt or truncated parquet ({said}); expected a whole file")
