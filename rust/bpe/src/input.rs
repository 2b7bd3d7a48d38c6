//! Inputs → chunks that may be worked on independently.
//!
//! In: an [`InputSpec`] or paths. Out: [`Chunk`]s in the order of the text, each cut at a place where no pre-token
//! and no special token can span the cut, so that neither chunk size nor threads change a result. Memory: one
//! chunk a caller (a text without any certain border, such as one huge word, has to fit as a whole, up to
//! [`MOST_UNCUT_BYTES`]). Called by `count` and `corpus`, by several threads in turn; `sources` does the reading.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::pretokenize::{Splitter, describe_invalid, first_invalid};
use crate::progress::Progress;
use crate::sources::feed::FeedSource;
use crate::sources::find::{Found, Kind, files};
use crate::sources::jsonl::{self, Jsonl, Records};
use crate::sources::sample::Sample;
use crate::sources::text::Text;
use crate::sources::unpack::{Stream, open_file};
use crate::sources::{DEFAULT_FIELD, End, InputSpec, Job, MOST_UNCUT_BYTES, Source};

/// Bytes of text that a thread takes at a time to count its words.
pub const DEFAULT_CHUNK_BYTES: usize = 1 << 20;

/// Where a part of a chunk stands in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// Where the part begins in the chunk.
    pub start: usize,
    /// In text files: its offset in the (unpacked) text. In records: its line or row, from 1.
    pub at: u64,
}

/// A part of a file that begins and ends at certain borders.
#[derive(Debug, Default)]
pub struct Chunk {
    /// Place in the order of the whole input, from 0.
    pub index: u64,
    /// Which of the files.
    pub file: usize,
    /// The text; of records, their texts one behind the other.
    pub bytes: Vec<u8>,
    /// Whether it consists of records: each a document, in which special tokens are text.
    pub records: bool,
    /// Bytes of the file that were read for it, for progress.
    pub read_bytes: u64,
    /// Whether the file ends here.
    pub ends_file: bool,
    pub(crate) places: Vec<Place>,
    /// Lines of records that are still to be made into texts, and the number of the first.
    pub(crate) raw: Vec<u8>,
    pub(crate) first_line: u64,
}

impl Chunk {
    /// The texts that no pre-token crosses, with their places in `bytes`: all of it, or record by record.
    pub fn texts(&self) -> impl Iterator<Item = (usize, &[u8])> {
        let whole = (!self.records).then_some((0, &*self.bytes));
        let records = if self.records { &*self.places } else { &[] };
        let ends = records.iter().skip(1).map(|place| place.start).chain([self.bytes.len()]);
        whole
            .into_iter()
            .chain(records.iter().zip(ends).map(|(place, end)| (place.start, &self.bytes[place.start..end])))
    }

    /// Number of records.
    pub fn record_count(&self) -> u64 {
        if self.records { self.places.len() as u64 } else { 0 }
    }
}

/// A place between two chunks: all text before it is handed out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Which of the files.
    pub file: usize,
    /// What of it is handed out: bytes of a text as a sample leaves it, lines of jsonl, rows of parquet.
    pub offset: u64,
    /// Bytes of text until the limit, where there is one.
    #[serde(default)]
    pub room: Option<u64>,
}

/// Input files, checked: each exists, is a file, can be opened, is what it says and is not empty.
#[derive(Debug)]
pub struct Inputs {
    files: Vec<Found>,
    spec: InputSpec,
    total_bytes: u64,
    text_bytes: AtomicU64,
}

impl Inputs {
    /// All of some files.
    pub fn open(paths: &[PathBuf]) -> Result<Self> {
        Self::of(InputSpec::of(paths))
    }

    /// Finds and checks every file before any work begins.
    pub fn of(spec: InputSpec) -> Result<Self> {
        spec.check()?;
        let files = files(&spec.paths, spec.field.is_some())?;
        if let (Some(field), true) = (&spec.field, files.iter().all(|file| file.kind == Kind::Text)) {
            let what = format!("field: found {field:?} for text files only; expected jsonl or parquet, or no field");
            return Err(Error::Config(what));
        }
        let mut this = Self { files, spec, total_bytes: 0, text_bytes: AtomicU64::new(0) };
        let sizes = (0..this.files.len()).map(|file| this.check(file).map_err(|e| this.named(file, e)));
        let sizes = sizes.collect::<Result<Vec<_>>>()?;
        // What comes through a pipe is not known in advance: then nothing is.
        let known = !this.files.iter().any(|file| file.stdin);
        this.total_bytes = if known { sizes.iter().sum() } else { 0 };
        Ok(this)
    }

    /// Says of a file that nobody named where it comes from.
    fn named(&self, file: usize, error: Error) -> Error {
        let found = |what: String| format!("found in a directory of the inputs: {what}");
        match error {
            error if !self.files[file].in_directory => error,
            Error::File { path, what } => Error::File { path, what: found(what) },
            Error::Format { place, what } => Error::Format { place, what: found(what) },
            error => error,
        }
    }

    /// The file's size, once it can be read.
    fn check(&self, file: usize) -> Result<u64> {
        let found = &self.files[file];
        let path = &found.path;
        if found.stdin {
            return Ok(0);
        }
        // Before it is opened, which a pipe that nobody writes to would never be.
        let metadata = path.metadata().map_err(|e| Error::io(path, &e))?;
        if !metadata.is_file() && !metadata.is_dir() {
            let what = "is a pipe or a device; expected a text file, or - for standard input".into();
            return Err(Error::File { path: path.clone(), what });
        }
        open_file(path)?;
        if metadata.len() == 0 {
            return Err(Error::File { path: path.clone(), what: "empty file (0 bytes); expected text".into() });
        }
        if found.kind == Kind::Parquet {
            self.open_file(file, None)?;
        } else if Stream::open(found, None)?.read_to(&mut Vec::new(), 1)? {
            let what = "unpacks to nothing (0 bytes); expected text".into();
            return Err(Error::File { path: path.clone(), what });
        }
        Ok(metadata.len())
    }

    /// The files, in the order of the text; `standard input` where that is one.
    pub fn paths(&self) -> impl ExactSizeIterator<Item = &Path> {
        self.files.iter().map(|file| &*file.path)
    }

    /// Sum of the files' sizes, packed as they are; 0 where it is not known.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// Sum of the sizes of the files before a place, of all where there is none; 0 where that is not known.
    pub fn bytes_before(&self, place: Option<Position>) -> u64 {
        let Some(Position { file, .. }) = place else { return self.total_bytes };
        self.files.iter().take(file).map(|file| file.path.metadata().map_or(0, |m| m.len())).sum()
    }

    /// Bytes of text handed out so far by all readers.
    pub fn text_bytes(&self) -> u64 {
        self.text_bytes.load(Relaxed)
    }

    /// What was asked for.
    pub(crate) fn spec(&self) -> &InputSpec {
        &self.spec
    }

    /// Whether a file is plain text as it lies on the disk, so that a place in it is one in its text.
    pub(crate) fn is_plain_text(&self, file: usize) -> Result<bool> {
        let found = &self.files[file];
        let plain = found.kind == Kind::Text && !found.stdin && self.spec.sample.is_none();
        Ok(plain && Stream::open(found, None)?.seek(0)?)
    }

    /// Whether the inputs can be read again.
    pub fn can_be_read_again(&self) -> bool {
        !self.files.iter().any(|file| file.stdin)
    }

    /// Adds the file and the place in it to an error of the text policy, met in the text that begins at `start`.
    pub fn locate(&self, chunk: &Chunk, start: usize, error: Error) -> Error {
        let Error::Text(what) = error else { return error };
        let file = &self.files[chunk.file];
        let path = file.path.display();
        // Empty records may begin at the same place: the last one there has the text.
        let text = chunk.texts().filter(|text| text.0 == start).last().map_or(&[][..], |text| text.1);
        let place = |at: usize| {
            let index = chunk.places.partition_point(|place| place.start <= at).saturating_sub(1);
            chunk.places.get(index).copied().unwrap_or(Place { start: 0, at: 0 })
        };
        if !chunk.records {
            return Error::Text(match first_invalid(text) {
                Some(at) => {
                    let offset = place(at).at + (at - place(at).start) as u64;
                    let line = self.line_of(chunk.file, offset);
                    format!("{path}: byte offset {offset}: {}", describe_invalid(text, at, line))
                }
                None => format!("{path}: {what}"),
            });
        }
        let (number, unit) = (place(start).at, if file.kind == Kind::Parquet { "row" } else { "line" });
        Error::Text(match first_invalid(text) {
            Some(at) => {
                format!("{path}: {unit} {number}: byte {at} of the text: {}", describe_invalid(text, at, None))
            }
            None => format!("{path}: {unit} {number}: {what}"),
        })
    }

    /// The line, from 1, of a byte of a file's text: read once more. None where that cannot be.
    fn line_of(&self, file: usize, offset: u64) -> Option<u64> {
        let found = &self.files[file];
        if found.stdin {
            return None;
        }
        let mut stream = Stream::open(found, None).ok()?;
        let (mut bytes, mut left, mut line) = (Vec::new(), offset, 1);
        while left > 0 {
            bytes.clear();
            stream.read_to(&mut bytes, left.min(1 << 20) as usize).ok()?;
            if bytes.is_empty() {
                return None;
            }
            left -= bytes.len() as u64;
            line += memchr::memchr_iter(b'\n', &bytes).count() as u64;
        }
        Some(line)
    }

    fn records(&self, file: usize) -> Records<'_> {
        let field = self.spec.field.as_deref().unwrap_or(DEFAULT_FIELD);
        Records { field, sample: self.sample(), path: &self.files[file].path }
    }

    fn sample(&self) -> Option<Sample> {
        self.spec.sample.map(|share| Sample::new(share, self.spec.seed))
    }

    fn open_file<'a>(&'a self, file: usize, progress: Option<&'a Progress>) -> Result<Box<dyn Source + 'a>> {
        let found = &self.files[file];
        Ok(match found.kind {
            Kind::Text => Box::new(Text::new(Stream::open(found, progress)?, self.sample().map(|s| (s, file)))),
            Kind::Jsonl => Box::new(Jsonl::new(Stream::open(found, progress)?, self.records(file))),
            Kind::Parquet => {
                let Some(open) = &self.spec.open_feed else {
                    let what = "is parquet, for which no reader was given; expected text or jsonl".into();
                    return Err(Error::File { path: found.path.clone(), what });
                };
                let feed = open(&found.path, self.records(file).field)?;
                let size = found.path.metadata().map_or(0, |m| m.len());
                Box::new(FeedSource::new(feed, (&found.path, size), self.sample(), progress))
            }
        })
    }
}

/// Hands out the chunks of [`Inputs`] to any number of threads.
pub struct ChunkReader<'a> {
    inputs: &'a Inputs,
    splitter: &'a Splitter,
    /// For records, in which special tokens are text.
    plain: Splitter,
    chunk_bytes: usize,
    most_uncut: usize,
    /// Files behind these are not read.
    files: usize,
    progress: Option<&'a Progress>,
    state: Mutex<State<'a>>,
}

struct State<'a> {
    next_index: u64,
    file_index: usize,
    open: Option<Box<dyn Source + 'a>>,
    /// Where to begin in the next file that is opened.
    start: u64,
    /// Of the open file.
    used: u64,
    /// Bytes of text until the limit.
    room: u64,
    finished: bool,
    /// A chunk was broken off half way: its source is of no use any more, but there is more behind its position.
    broken_off: bool,
}

impl State<'_> {
    fn at(file_index: usize, start: u64, room: u64) -> Self {
        Self { next_index: 0, file_index, open: None, start, used: 0, room, finished: false, broken_off: false }
    }
}

impl<'a> ChunkReader<'a> {
    /// A reader at the beginning of the first file. `chunk_bytes` is a wish; 0 counts as 1.
    pub fn new(inputs: &'a Inputs, splitter: &'a Splitter, chunk_bytes: usize) -> Self {
        let room = inputs.spec.limit_bytes.unwrap_or(u64::MAX);
        let (plain, state) = (splitter.without_specials(), Mutex::new(State::at(0, 0, room)));
        let (chunk_bytes, most_uncut) = (chunk_bytes.max(1), MOST_UNCUT_BYTES);
        let files = inputs.files.len();
        Self { inputs, splitter, plain, chunk_bytes, most_uncut, files, progress: None, state }
    }

    /// Reads the first files only.
    #[must_use]
    pub(crate) fn up_to(self, files: usize) -> Self {
        Self { files, ..self }
    }

    /// Lets `progress` stop a reader, also one that waits for standard input, in the middle of a chunk.
    #[must_use]
    pub fn stopped_by(self, progress: &'a Progress) -> Self {
        Self { progress: Some(progress), ..self }
    }

    /// Goes on behind what another reader of the same inputs has handed out.
    #[must_use]
    pub fn starting_at(self, position: Position) -> Self {
        let room = position.room.unwrap_or(u64::MAX);
        Self { state: Mutex::new(State::at(position.file, position.offset, room)), ..self }
    }

    /// Up to where chunks were handed out; none: all were. A chunk that was broken off lies behind it.
    pub fn position(&self) -> Option<Position> {
        let state = self.state.lock().ok()?;
        let offset = state.open.as_ref().map_or(state.start, |source| source.position());
        let room = (state.room < u64::MAX).then_some(state.room);
        let more = !state.finished && state.file_index < self.files;
        more.then_some(Position { file: state.file_index, offset, room })
    }

    /// Another bound than [`MOST_UNCUT_BYTES`].
    #[must_use]
    pub fn with_most_uncut(self, most_uncut: usize) -> Self {
        Self { most_uncut, ..self }
    }

    /// What splits a chunk's texts: in records special tokens are text.
    pub fn splitter(&self, chunk: &Chunk) -> &Splitter {
        if chunk.records { &self.plain } else { self.splitter }
    }

    /// Fills `chunk` (whose memory is used again) with the next one; `false` once all is handed out, or another
    /// thread has met an error.
    ///
    /// # Errors
    /// [`Error::Interrupted`] where it was stopped: `chunk` holds nothing then, and [`Self::position`] is before it.
    pub fn next(&self, chunk: &mut Chunk) -> Result<bool> {
        let filled = self.take(chunk).and_then(|more| {
            // Outside of the lock: other threads read on meanwhile.
            if more && !chunk.raw.is_empty() {
                jsonl::unpack(chunk, self.inputs.records(chunk.file), &self.plain, u64::MAX)?;
            }
            Ok(more)
        });
        match &filled {
            Ok(true) => {
                self.inputs.text_bytes.fetch_add(chunk.bytes.len() as u64, Relaxed);
            }
            Ok(false) | Err(Error::Interrupted) => {}
            Err(_) => self.state.lock().map_err(|_| Error::Interrupted)?.finished = true,
        }
        filled
    }

    fn take(&self, chunk: &mut Chunk) -> Result<bool> {
        let mut state = self.state.lock().map_err(|_| Error::Interrupted)?;
        let taken = self.take_next(&mut state, chunk);
        // Before the lock is given up: whoever waits for it would read on behind the error.
        match taken {
            Err(Error::Interrupted) => state.broken_off = true,
            Err(_) => state.finished = true,
            Ok(_) => {}
        }
        taken
    }

    fn take_next(&self, state: &mut State<'a>, chunk: &mut Chunk) -> Result<bool> {
        if state.finished || state.broken_off || state.file_index >= self.files {
            return Ok(false);
        }
        let source = match &mut state.open {
            Some(source) => source,
            none => {
                let mut source = self.inputs.open_file(state.file_index, self.progress)?;
                if state.start > 0 {
                    let found = &self.inputs.files[state.file_index];
                    if found.stdin {
                        let what = "cannot be read again; expected files where a run is to go on".into();
                        return Err(Error::File { path: found.path.clone(), what });
                    }
                    source.skip(state.start, self.splitter)?;
                }
                // Only now is the source at a position of its own.
                state.start = 0;
                none.insert(source)
            }
        };
        (chunk.index, chunk.file) = (state.next_index, state.file_index);
        chunk.raw.clear();
        let (splitter, plain) = (self.splitter, &self.plain);
        let (chunk_bytes, most_uncut, room) = (self.chunk_bytes, self.most_uncut, state.room);
        let end = source.fill(chunk, Job { splitter, plain, chunk_bytes, most_uncut, room })?;
        chunk.read_bytes = source.used().saturating_sub(state.used);
        chunk.ends_file = end != End::Open;
        state.used += chunk.read_bytes;
        state.next_index += 1;
        if room < u64::MAX {
            state.room -= chunk.bytes.len() as u64;
        }
        state.finished = end == End::Limit || state.room == 0;
        if chunk.ends_file {
            (state.open, state.used) = (None, 0);
            state.file_index += 1;
        }
        Ok(true)
    }
}
