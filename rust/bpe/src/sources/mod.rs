//! Where text comes from: files of several kinds, packed or not, folders, globs, standard input.
//!
//! In: an [`InputSpec`], the one value that describes an input. Out: open [`Source`]s, each of which fills
//! chunks for `input`, which owns their order and the lock round them. docs/inputs.md is the page for people.
//!
//! `find` turns what was named into files; `unpack` decompresses; `text`, `jsonl` and `feed` are the kinds of
//! files; `sample` chooses documents; `document` gathers records and ends them at the limit; `pipe` is standard input.

pub(crate) mod document;
pub mod feed;
pub(crate) mod find;
pub(crate) mod jsonl;
pub(crate) mod pipe;
pub(crate) mod sample;
pub(crate) mod text;
pub(crate) mod unpack;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::input::Chunk;
use crate::pretokenize::Splitter;

pub use feed::{Feed, OpenFeed};

/// The field of records whose text is read when none is named.
pub const DEFAULT_FIELD: &str = "text";
/// The longest text without a certain border, the longest line of records: more is refused, so that a small
/// packed file of one endless word cannot fill the memory.
pub const MOST_UNCUT_BYTES: usize = 1 << 30;

/// What to read, in one value.
#[derive(Clone, Default)]
pub struct InputSpec {
    /// Files, folders, globs, and `-` for standard input, in the order of the text.
    pub paths: Vec<PathBuf>,
    /// Field or column of records that holds the text; `None`: [`DEFAULT_FIELD`], and standard input is text.
    pub field: Option<String>,
    /// Stop after so many bytes of text.
    pub limit_bytes: Option<u64>,
    /// The share of documents to read, above 0 and at most 1.
    pub sample: Option<f64>,
    /// Which documents those are.
    pub seed: u64,
    /// Who reads parquet.
    pub open_feed: Option<Arc<OpenFeed>>,
}

impl fmt::Debug for InputSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { paths, field, limit_bytes, sample, seed, open_feed: _ } = self;
        let all = (paths, field, limit_bytes, sample, seed);
        f.debug_tuple("InputSpec").field(&all).finish()
    }
}

impl InputSpec {
    /// All of some files.
    pub fn of(paths: &[PathBuf]) -> Self {
        Self { paths: paths.to_vec(), ..Self::default() }
    }

    /// The files of what was named, in the order of the text, none of them opened; `-` stays as it is.
    pub fn find(&self) -> Result<Vec<PathBuf>> {
        let files = find::files(&self.paths, false)?;
        Ok(files.into_iter().map(|file| if file.stdin { "-".into() } else { file.path }).collect())
    }

    /// Refuses what cannot work before anything is opened.
    pub(crate) fn check(&self) -> Result<()> {
        let wrong = |what: &str| Err(Error::Config(what.into()));
        if self.paths.is_empty() {
            return wrong("inputs: found none; expected at least one text file");
        }
        if self.limit_bytes == Some(0) {
            return wrong("limit_bytes: found 0; expected 1 or more");
        }
        if let Some(share) = self.sample
            && !(share > 0.0 && share <= 1.0)
        {
            return wrong(&format!("sample: found {share}; expected a share above 0 and at most 1"));
        }
        if self.field.as_deref() == Some("") {
            return wrong("field: found an empty name; expected the field of the records that holds the text");
        }
        Ok(())
    }
}

/// How a chunk ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// More of the file follows.
    Open,
    /// With its file.
    File,
    /// With the input: the limit is reached.
    Limit,
}

/// What a source must know of the job that reads it.
#[derive(Clone, Copy)]
pub(crate) struct Job<'a> {
    /// Cuts text files; knows their special tokens.
    pub splitter: &'a Splitter,
    /// Cuts records: no special token is one there.
    pub plain: &'a Splitter,
    /// Bytes of text wanted in a chunk.
    pub chunk_bytes: usize,
    /// Longest text without a border.
    pub most_uncut: usize,
    /// Bytes of text until the limit.
    pub room: u64,
}

/// A file that is being read; called under the reader's lock.
pub(crate) trait Source: Send {
    /// Fills an empty chunk with what comes next. Broken off, it has handed out nothing: the position stays where it was,
    /// and nothing else is asked of it.
    fn fill(&mut self, chunk: &mut Chunk, job: Job<'_>) -> Result<End>;

    /// Bytes of the file read so far, for progress.
    fn used(&self) -> u64;

    /// What was handed out in whole chunks: bytes of text, lines or rows.
    fn position(&self) -> u64;

    /// Goes on behind what was handed out before; called before anything is.
    fn skip(&mut self, to: u64, splitter: &Splitter) -> Result<()>;
}

/// The way out where it is the cap on memory that refuses a text.
pub(crate) fn more_memory(job: &Job<'_>) -> &'static str {
    if job.most_uncut < MOST_UNCUT_BYTES { ", or a larger --max-memory" } else { "" }
}

/// Where a text without borders must end: at its last certain border, else behind its last whole character.
pub(crate) fn last_border(bytes: &[u8], splitter: &Splitter) -> usize {
    splitter.safe_cut(bytes).unwrap_or_else(|| {
        let tail = bytes.len().saturating_sub(3);
        // The first of the last three bytes that begins a character which does not end.
        let broken = (tail..bytes.len()).find(|&at| {
            let part = std::str::from_utf8(&bytes[at..]);
            bytes[at] >= 0xc2 && part.is_err_and(|e| e.valid_up_to() == 0 && e.error_len().is_none())
        });
        broken.unwrap_or(bytes.len())
    })
}
