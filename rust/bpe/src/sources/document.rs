//! Records one after another → a chunk: their texts joined, the place of each kept, the limit held.
//!
//! In: documents with their numbers in the file. Out: a filled chunk. Called by `jsonl` and `feed`.

use crate::error::Result;
use crate::input::{Chunk, Place};
use crate::pretokenize::Splitter;
use crate::sources::last_border;
use crate::sources::sample::Sample;

/// Takes documents into an empty chunk.
pub(crate) struct Gather<'a> {
    bytes: &'a mut Vec<u8>,
    places: &'a mut Vec<Place>,
    file: usize,
    sample: Option<Sample>,
    plain: &'a Splitter,
    room: u64,
    full: bool,
}

impl<'a> Gather<'a> {
    /// `room`: bytes of text until the limit, at least one.
    pub fn new(chunk: &'a mut Chunk, sample: Option<Sample>, plain: &'a Splitter, room: u64) -> Self {
        let Chunk { bytes, places, file, .. } = chunk;
        bytes.clear();
        places.clear();
        Self { bytes, places, file: *file, sample, plain, room, full: false }
    }

    /// Whether the sample takes the document of this number.
    pub fn takes(&self, number: u64) -> bool {
        self.sample.is_none_or(|sample| sample.takes(self.file, number))
    }

    /// Adds a document that `write` appends; the one that crosses the limit is cut there.
    pub fn add(&mut self, number: u64, write: impl FnOnce(&mut Vec<u8>) -> Result<()>) -> Result<()> {
        let start = self.bytes.len();
        write(self.bytes)?;
        self.places.push(Place { start, at: number });
        let total = self.bytes.len() as u64;
        if total > self.room {
            let end = start + last_border(&self.bytes[start..self.room as usize], self.plain);
            self.bytes.truncate(end);
        }
        self.full = total >= self.room;
        Ok(())
    }

    /// Whether the limit is reached.
    pub fn full(&self) -> bool {
        self.full
    }

    /// Bytes of text so far.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }
}
