"""A column of text of a parquet file, batch by batch, through pyarrow.

In: a path and a column's name. Out: parts of it as the bytes and borders that Arrow keeps them in. Called by the
core's binding (`rust/py/src/inputs.rs`), from the threads that count; pyarrow is imported only here.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bytekiln.errors import FormatError, MissingExtraError

BATCH_BYTES = 1 << 20
"""Text that is asked for at a time, by the file's own account of how long its texts are."""
PAGE_BYTES = 256 << 10
"""Of the file that are read at a time."""
MOST_ROWS = 8192
"""Rows of a batch at most."""
DICTIONARY_BYTES = 2 << 20
"""A group of rows with little more than so much, and some bytes a row, may consist of a few texts that repeat: its own
account of their lengths says nothing then. One that does is read as those texts and their places, which is slower."""
INDEX_BYTES = 4
"""Of the place of a text that repeats, at most."""
HIDDEN_BYTES = 16 << 20
"""Text that a batch may turn out to hold, whatever its account says."""
HEAD_BYTES = 64
"""More than what says how many texts a dictionary has."""
DICTIONARY_ROWS = 4 * MOST_ROWS
"""Rows of a batch of places, each of which brings the texts along."""
MOST_GROUPS = 32
"""Groups of rows that are read as one: small ones would take longer to open than to read."""
WITH_DICTIONARY = frozenset({"PLAIN", "RLE", "BIT_PACKED", "PLAIN_DICTIONARY", "RLE_DICTIONARY"})
"""Encodings of which pyarrow gives the texts and their places; of others it gives texts only."""


class Group(NamedTuple):
    """A group of rows, as the file describes it.

    Attributes:
        number: in the file.
        before: rows of the file before it.
        rows: in it.
        mean: bytes of a text, by what is in the file for it.
        batch: rows to read at a time.
        dictionary: where in the file its dictionary begins, if it may consist of a few texts that repeat.
    """

    number: int
    before: int
    rows: int
    mean: int
    batch: int
    dictionary: int | None


def _texts_in(head: bytes) -> int:
    """How many texts a dictionary page holds, by its first bytes; 0 where they do not say so.

    They are a `PageHeader` of parquet's own definition in Thrift's compact protocol: numbers, of which field 1, the
    type, must be 2; field 7 is a structure whose field 1 is the number of texts.

    >>> _texts_in(bytes([0x15, 4, 0x15, 60, 0x15, 40, 0x4C, 0x15, 0x96, 1, 0x15, 0]))
    75
    """
    at, field, inside = 0, 0, False
    while at < len(head) and head[at] >> 4:
        field, kind, at = field + (head[at] >> 4), head[at] & 15, at + 1
        if kind == 12 and field == 7:
            field, inside = 0, True
            continue
        if kind != 5:
            break
        value = shift = 0
        while at < len(head):
            value, shift, at = value | (head[at] & 127) << shift, shift + 7, at + 1
            if head[at - 1] < 128:
                break
        else:
            break
        if field == 1 and inside:
            return value >> 1
        if field == 1 and value >> 1 != 2:
            break
    return 0


def _groups(metadata: Any, field: str) -> Iterator[Group]:  # noqa: ANN401 - pyarrow has no types
    before, place = 0, None
    for number in range(metadata.num_row_groups if metadata.num_rows else 0):
        group = metadata.row_group(number)
        rows = group.num_rows
        if place is None:  # in all groups the same
            places = range(group.num_columns)
            place = next((n for n in places if group.column(n).path_in_schema == field), None)
        if place is None or not rows:
            continue
        chunk = group.column(place)
        size = chunk.total_uncompressed_size
        batch = max(1, min(MOST_ROWS, BATCH_BYTES * rows // max(size, 1)))
        may_repeat = (
            size <= DICTIONARY_BYTES + INDEX_BYTES * rows
            and size * min(batch, rows) > HIDDEN_BYTES
            and chunk.has_dictionary_page
            and WITH_DICTIONARY.issuperset(chunk.encodings)
        )
        dictionary = chunk.dictionary_page_offset if may_repeat else None
        yield Group(number, before, rows, size // rows, batch, dictionary)
        before += rows


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
        self._file, self._dictionary_file = file, None
        self._groups = list(_groups(file.metadata, field))
        self._batches: Iterator[Any] = iter(())
        self._parts: Iterator[Any] = iter(())

    def next(self, most: int) -> tuple[bytes, bytes] | None:
        """The next texts: their borders (int64, one more than texts) and the bytes between; None at the end.

        Args:
            most: bytes of a text at most; a longer one comes alone, for the caller to refuse.

        Raises:
            FormatError: damaged data, a row without a text, or texts that are surely longer than `most`.
        """
        try:
            while (part := next(self._parts, None)) is None:
                if (batch := next(self._batches, None)) is not None:
                    self._parts = self._split(batch.column(0))
                elif self._groups:
                    self._batches = self._begin(most)
                else:
                    return None
            column = part.cast(self._text)
        except self._damage as error:
            raise self._damaged(error) from None
        _, borders, data = column.buffers()
        first, end = 8 * column.offset, 8 * (column.offset + len(column) + 1)
        return bytes(memoryview(borders)[first:end]), bytes(data or b"")

    def _begin(self, most: int) -> Iterator[Any]:
        """The batches of the next group of rows, and of those behind it that are read as it is."""
        # Twice: the account has more in it than the texts.
        first, longest = self._groups[0], 2 * most
        if first.mean > longest:
            raise FormatError(
                f"{self._path}: rows {first.before + 1:,} to {first.before + first.rows:,}: {first.mean:,} bytes of "
                f"text on average; expected at most {most:,}: shorter texts, or a larger --max-memory"
            )
        repeats, run = self._repeats(first), [first]
        for group in self._groups[1:MOST_GROUPS]:
            alike = group.batch.bit_length() == first.batch.bit_length() and group.mean <= longest
            if not alike or self._repeats(group) != repeats:
                break
            run.append(group)
        del self._groups[: len(run)]
        file = self._with_dictionary() if repeats else self._file
        rows = DICTIONARY_ROWS if repeats else min(group.batch for group in run)
        batches: Iterator[Any] = file.iter_batches(
            rows, row_groups=[group.number for group in run], columns=[self._field]
        )
        return batches

    def _repeats(self, group: Group) -> bool:
        """Whether rows that are read as texts might be far more than their account."""
        from pyarrow import compute

        if group.dictionary is None:
            return False
        with Path(self._path).open("rb") as file:
            file.seek(group.dictionary)
            if _texts_in(file.read(HEAD_BYTES)) == group.rows:
                return False
        # One row brings all texts of the dictionary. No more rows than they are fewer than all repeat one of them.
        batches = self._with_dictionary().iter_batches(1, row_groups=[group.number], columns=[self._field])
        if (row := next(batches, None)) is None:
            return False
        texts = row.column(0).dictionary
        longest = compute.max(compute.binary_length(texts)).as_py() or 0
        repeating: int = min(group.batch, group.rows - len(texts)) * longest
        return repeating > HIDDEN_BYTES

    def _with_dictionary(self) -> Any:  # noqa: ANN401 - pyarrow has no types
        """The file, opened so that texts that repeat come with their places."""
        if self._dictionary_file is None:
            from pyarrow.parquet import ParquetFile

            self._dictionary_file = ParquetFile(
                self._path,
                buffer_size=PAGE_BYTES,
                pre_buffer=False,
                read_dictionary=[self._field],
                metadata=self._file.metadata,
            )
        return self._dictionary_file

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
        texts, places = column.dictionary, column.indices
        lengths = compute.binary_length(texts).take(places)
        ends = memoryview(compute.cumulative_sum(lengths.cast("int64")).buffers()[1]).cast("q")
        start, end = 0, 0
        while start < len(places):
            rows = max(1, bisect_right(ends, end + BATCH_BYTES, start, len(places)) - start)
            # The texts of these rows only: a slice would bring all of them along.
            yield texts.take(places.slice(start, rows))
            start, end = start + rows, ends[start + rows - 1]

    def _damaged(self, error: Exception) -> FormatError:
        said = "; ".join(line.strip() for line in str(error).splitlines())
        if "ot yet implemented" in said or isinstance(error, NotImplementedError):
            return FormatError(f"{self._path}: pyarrow cannot read it ({said}); expected another encoding")
        return FormatError(f"{self._path}: corrupt or truncated parquet ({said}); expected a whole file")
