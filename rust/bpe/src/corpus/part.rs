//! Which text one of several processes reads: a part of the inputs, from one certain border to another.
//!
//! In: inputs and "part i of n". Out: where to begin and where to end. All parts, in their order, are all of the text, and
//! each depends on the files and the numbers alone. Called by `corpus`.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use super::EncodeOptions;
use crate::error::{Error, Result};
use crate::input::{Chunk, ChunkReader, Inputs, Position};
use crate::pretokenize::Splitter;

/// Bytes behind a place in which a border is looked for; twice as many where there is none.
const WINDOW: usize = 64 << 10;
/// A border is told by what stands at most so many bytes before it, special tokens aside.
const LOOK_BACK: usize = 16;

/// From a file and a byte of its text up to another; the end of all: behind the last file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stretch {
    pub start: (usize, u64),
    pub end: (usize, u64),
}

impl Stretch {
    pub fn of(options: &EncodeOptions, inputs: &Inputs, splitter: &Splitter) -> Result<Self> {
        let files = inputs.paths().len();
        let Some((number, of)) = options.part else { return Ok(Self { start: (0, 0), end: (files, 0) }) };
        if number < 1 || number > of {
            return Err(Error::Config(format!("part: found {number}/{of}; expected i/n with i from 1 to n")));
        }
        let whole = if !inputs.can_be_read_again() {
            Some("standard input")
        } else if inputs.spec().limit_bytes.is_some() {
            Some("limit_bytes")
        } else {
            options.max_tokens.map(|_| "max_tokens")
        };
        if let Some(whole) = whole {
            return Err(Error::Config(format!(
                "part: found it with {whole}, which depends on all text before; expected one of the two"
            )));
        }
        let cuts = Cuts { inputs, splitter, within: options.split.is_empty() };
        Ok(Self { start: cuts.cut(number - 1, of)?, end: cuts.cut(number, of)? })
    }

    /// Bytes of the files, packed as they are; 0 where that is not known.
    pub fn bytes(&self, inputs: &Inputs) -> u64 {
        let before = |(file, offset): (usize, u64)| {
            let place = (file < inputs.paths().len()).then_some(Position { file, offset, room: None });
            inputs.bytes_before(place) + offset
        };
        before(self.end).saturating_sub(before(self.start))
    }

    /// Cuts a chunk off where the part ends; `None`: it lies behind that.
    pub fn cut(&self, chunk: &mut Chunk) -> Option<Cut> {
        if (chunk.file, 0) >= self.end {
            return None;
        }
        if chunk.file != self.end.0 {
            return Some(Cut::Whole);
        }
        let at = chunk.places.first().map_or(0, |place| place.at);
        let room = self.end.1.saturating_sub(at);
        if room == 0 {
            return None;
        }
        if (chunk.bytes.len() as u64) < room {
            return Some(Cut::Whole);
        }
        chunk.bytes.truncate(room as usize);
        Some(Cut::Last)
    }
}

/// What is left of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cut {
    Whole,
    /// The part ends here.
    Last,
}

struct Cuts<'a> {
    inputs: &'a Inputs,
    splitter: &'a Splitter,
    /// Files may be cut.
    within: bool,
}

impl Cuts<'_> {
    /// Where part `number`, from 0, begins: at its share of all bytes, or at the next border.
    fn cut(&self, number: u64, of: u64) -> Result<(usize, u64)> {
        let files = self.inputs.paths().len();
        if number == of {
            return Ok((files, 0));
        }
        let mut left = (u128::from(self.inputs.total_bytes()) * u128::from(number) / u128::from(of)) as u64;
        for (file, path) in self.inputs.paths().enumerate() {
            let size = path.metadata().map_err(|e| Error::io(path, &e))?.len();
            if left == 0 {
                return Ok((file, 0));
            }
            if left < size {
                let inside = self.within && !self.splitter.pattern().is_custom() && self.inputs.is_plain_text(file)?;
                let cut = if inside { self.border(file, left)? } else { None };
                return Ok(cut.filter(|&cut| cut < size).map_or((file + 1, 0), |cut| (file, cut)));
            }
            left -= size;
        }
        Ok((files, 0))
    }

    /// The last certain border of a window that begins at a byte of a plain text.
    fn border(&self, file: usize, at: u64) -> Result<Option<u64>> {
        let path = self.inputs.paths().nth(file).unwrap_or_else(|| std::path::Path::new(""));
        let failed = |e: std::io::Error| Error::io(path, &e);
        // Special tokens that begin before the border must be seen.
        let before = (self.splitter.longest_special() + LOOK_BACK) as u64;
        let from = at.saturating_sub(before);
        let mut source = File::open(path).map_err(failed)?;
        source.seek(SeekFrom::Start(from)).map_err(failed)?;
        let (mut bytes, mut wanted) = (Vec::new(), WINDOW);
        loop {
            let read = (&mut source).take((wanted - bytes.len()) as u64).read_to_end(&mut bytes).map_err(failed)?;
            let cut = self
                .splitter
                .safe_cut(&bytes)
                .map(|cut| cut as u64)
                .filter(|&cut| from + cut >= at && cut >= before.min(at));
            if cut.is_some() || read == 0 {
                return Ok(cut.map(|cut| from + cut));
            }
            wanted *= 2;
        }
    }
}

/// Whether a file's text before a place has an end-of-text token, and text that is more than white space behind the last one.
pub(super) fn before(inputs: &Inputs, splitter: &Splitter, file: usize, to: u64) -> Result<(bool, bool)> {
    let reader = ChunkReader::new(inputs, splitter, crate::input::DEFAULT_CHUNK_BYTES);
    let reader = reader.starting_at(Position { file, offset: 0, room: None });
    let stretch = Stretch { start: (file, 0), end: (file, to) };
    let (mut chunk, mut ended, mut open) = (Chunk::default(), false, false);
    while reader.next(&mut chunk)? {
        let Some(cut) = stretch.cut(&mut chunk) else { break };
        let mut from = 0;
        for (start, end, is_eot) in splitter.specials_in(&chunk.bytes) {
            open = !is_eot && (open || start > from || end > start);
            ended |= is_eot;
            from = end;
        }
        open |= !chunk.bytes[from..].iter().all(u8::is_ascii_whitespace);
        if cut == Cut::Last {
            break;
        }
    }
    Ok((ended, open))
}
