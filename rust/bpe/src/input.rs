//! Text files → chunks that may be worked on independently.
//!
//! In: paths. Out: [`Chunk`]s in the order of the text, each cut at a place where no pre-token and no special
//! token can span the cut, so that neither chunk size nor threads change a result. Memory: one chunk a caller
//! (a text without any certain border, such as one huge word, has to fit as a whole).
//! Called by `count` and `corpus`, by several threads in turn.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::pretokenize::{Splitter, describe_invalid, first_invalid};

/// Bytes of text that a thread takes at a time.
pub const DEFAULT_CHUNK_BYTES: usize = 1 << 20;

/// A part of a file that begins and ends at certain borders.
#[derive(Debug, Default)]
pub struct Chunk {
    /// Place in the order of the whole input, from 0.
    pub index: u64,
    /// Which of the files.
    pub file: usize,
    /// Offset of `bytes` in its file.
    pub offset: u64,
    /// The text.
    pub bytes: Vec<u8>,
    /// Whether the file ends here.
    pub ends_file: bool,
}

/// A place between two chunks: all text before it is handed out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Which of the files.
    pub file: usize,
    /// Offset in it.
    pub offset: u64,
}

/// Input files, checked: each exists, is a file, can be opened and is not empty.
#[derive(Debug)]
pub struct Inputs {
    paths: Vec<PathBuf>,
    /// Of each file.
    sizes: Vec<u64>,
    total_bytes: u64,
}

impl Inputs {
    /// Checks every path before any work begins.
    pub fn open(paths: &[PathBuf]) -> Result<Self> {
        if paths.is_empty() {
            return Err(Error::Config("inputs: found none; expected at least one text file".into()));
        }
        let (mut sizes, mut total_bytes) = (Vec::with_capacity(paths.len()), 0);
        for path in paths {
            let found = open_text(path)?.metadata().map_err(|e| Error::io(path, &e))?;
            if !found.is_file() {
                let what = "is a pipe or a device; expected a text file".into();
                return Err(Error::File { path: path.clone(), what });
            }
            let size = found.len();
            if size == 0 {
                return Err(Error::File { path: path.clone(), what: "empty file (0 bytes); expected text".into() });
            }
            total_bytes += size;
            sizes.push(size);
        }
        Ok(Self { paths: paths.to_vec(), sizes, total_bytes })
    }

    /// The paths, as given.
    pub fn paths(&self) -> &[PathBuf] {
        &self.paths
    }

    /// Sum of the sizes.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// Bytes before a place; none is the end.
    pub fn bytes_before(&self, position: Option<Position>) -> u64 {
        position.map_or(self.total_bytes, |Position { file, offset }| self.sizes[..file].iter().sum::<u64>() + offset)
    }

    /// The place behind so many bytes; none: the end.
    pub fn position_of(&self, bytes: u64) -> Option<Position> {
        let mut offset = bytes;
        for (file, &size) in self.sizes.iter().enumerate() {
            if offset < size {
                return Some(Position { file, offset });
            }
            offset -= size;
        }
        None
    }

    /// Adds the file and the offset in it to an error of the text policy.
    pub fn locate(&self, chunk: &Chunk, error: Error) -> Error {
        let Error::Text(what) = error else { return error };
        let path = self.paths[chunk.file].display();
        match first_invalid(&chunk.bytes) {
            Some(at) => {
                let offset = chunk.offset + at as u64;
                Error::Text(format!("{path}: byte offset {offset}: {}", describe_invalid(&chunk.bytes, at)))
            }
            None => Error::Text(format!("{path}: {what}")),
        }
    }
}

fn open_text(path: &Path) -> Result<File> {
    let file = File::open(path).map_err(|e| Error::io(path, &e))?;
    if file.metadata().is_ok_and(|m| m.is_dir()) {
        return Err(Error::File { path: path.into(), what: "is a directory; expected a text file".into() });
    }
    Ok(file)
}

/// Hands out the chunks of [`Inputs`] to any number of threads.
#[derive(Debug)]
pub struct ChunkReader<'a> {
    inputs: &'a Inputs,
    splitter: &'a Splitter,
    chunk_bytes: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    next_index: u64,
    file_index: usize,
    file: Option<File>,
    offset: u64,
    /// Bytes that were read behind the last cut.
    rest: Vec<u8>,
}

impl<'a> ChunkReader<'a> {
    /// A reader at the beginning of the first file. `chunk_bytes` is a wish; 0 counts as 1.
    pub fn new(inputs: &'a Inputs, splitter: &'a Splitter, chunk_bytes: usize) -> Self {
        Self { inputs, splitter, chunk_bytes: chunk_bytes.max(1), state: Mutex::default() }
    }

    /// Goes on behind what another reader has handed out.
    #[must_use]
    pub fn starting_at(self, Position { file, offset }: Position) -> Self {
        let state = State { file_index: file, offset, ..State::default() };
        Self { state: state.into(), ..self }
    }

    /// Up to where chunks were handed out; none: all were.
    pub fn position(&self) -> Option<Position> {
        let state = self.state.lock().ok()?;
        (state.file_index < self.inputs.paths.len())
            .then_some(Position { file: state.file_index, offset: state.offset })
    }

    /// Fills `chunk` (whose memory is used again) with the next one; `false` once all is handed out.
    pub fn next(&self, chunk: &mut Chunk) -> Result<bool> {
        let mut guard = self.state.lock().map_err(|_| Error::Interrupted)?;
        let state = &mut *guard;
        let Some(path) = self.inputs.paths.get(state.file_index) else { return Ok(false) };
        let file = match &mut state.file {
            Some(file) => file,
            none => {
                let mut file = open_text(path)?;
                file.seek(SeekFrom::Start(state.offset)).map_err(|e| Error::io(path, &e))?;
                none.insert(file)
            }
        };
        let bytes = &mut chunk.bytes;
        bytes.clear();
        bytes.append(&mut state.rest);
        let mut wanted = self.chunk_bytes;
        let mut searched = 0;
        let (cut, ends_file) = loop {
            let missing = wanted.saturating_sub(bytes.len());
            let read = file.take(missing as u64).read_to_end(bytes).map_err(|e| Error::io(path, &e))?;
            if read < missing {
                break (bytes.len(), true);
            }
            if bytes.len() > searched {
                searched = bytes.len();
                if let Some(cut) = self.splitter.safe_cut(bytes) {
                    break (cut, false);
                }
            }
            // No certain border yet: twice as much, so that the searches stay linear in sum.
            wanted = bytes.len().max(self.chunk_bytes) * 2;
        };
        state.rest.extend_from_slice(&bytes[cut..]);
        bytes.truncate(cut);
        (chunk.index, chunk.file, chunk.offset, chunk.ends_file) =
            (state.next_index, state.file_index, state.offset, ends_file);
        state.next_index += 1;
        state.offset += cut as u64;
        if ends_file {
            (state.file, state.offset) = (None, 0);
            state.file_index += 1;
        }
        Ok(true)
    }
}
