//! One file of ids that grows, and the ends of its documents beside it.
//!
//! In: ids in order. Out: a file that is complete under its temporary name. Called by `outlet`; `resume` keeps the
//! [`FileState`].

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use twox_hash::xxhash3_128::Hasher as Xxh3;

use super::lengths::Known;
use crate::atomic::{AtomicFile, OpenFile};
use crate::error::{Error, Result};
use crate::tokens::{Dtype, NPY_HEADER, checksum_of_file, checksum_text, hash_of_file, npy_header};
use crate::train::TokenId;

/// Ends of documents are written when there are so many bytes of them.
const ENDS_AT_ONCE: usize = 64 << 10;

/// What decides the files.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    pub dtype: Dtype,
    pub shard_tokens: Option<u64>,
    /// Write where documents end.
    pub index: bool,
    pub overwrite: bool,
}

/// What a file of ids holds so far.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FileState {
    pub tokens: u64,
    pub text_bytes: u64,
    pub documents: u64,
    pub max_id: Option<TokenId>,
    /// Text stands behind the last end of a document; of a complete file, before that was ended with it.
    pub open: bool,
    /// The last end, which moves where nothing but white space follows; those before it are written.
    pub last_end: Option<u64>,
    /// White space behind the last end, in ids: of a complete file whose ends are written.
    pub tail: u64,
    /// Of the ids.
    pub checksum: String,
    /// Of the ends that are written, less the header; of a complete file, of the whole file of ends.
    pub ends_checksum: String,
}

/// Ends of documents, in a file of their own.
struct Ends {
    file: AtomicFile,
    waiting: Vec<u8>,
    hash: Xxh3,
}

impl Ends {
    fn write_out(&mut self) -> Result<()> {
        self.hash.write(&self.waiting);
        self.file.write(&self.waiting)?;
        self.waiting.clear();
        Ok(())
    }
}

/// A file of ids that grows.
pub(super) struct Writer {
    pub file: AtomicFile,
    ends: Option<Ends>,
    dtype: Dtype,
    /// Bytes of the header.
    head: u64,
    hash: Xxh3,
    pub state: FileState,
}

impl Writer {
    /// Begins a file, or goes on behind what `state` says; the bytes there are checked against it.
    pub fn open(mut file: AtomicFile, path: &Path, layout: Layout, state: Option<FileState>) -> Result<Self> {
        let Layout { dtype, index, .. } = layout;
        let head = head_of(path);
        let ends = index.then(|| AtomicFile::take_up(&ends_path(path), layout.overwrite));
        let mut ends = ends.transpose()?;
        let state = state.unwrap_or_default();
        let begins = state == FileState::default();
        let (mut hash, mut ends_hash) = (Xxh3::new(), Xxh3::new());
        if begins {
            file.cut(0)?;
            file.write(&npy_header(dtype.descr(), 0)[..head as usize])?;
            if let Some(ends) = &mut ends {
                ends.cut(0)?;
                ends.write(&npy_header("<i8", 0))?;
            }
        } else {
            let len = head + state.tokens * dtype.size() as u64;
            hash = taken_up(&mut file, head, len, &state.checksum)?;
            if let Some(ends) = &mut ends {
                let written = state.documents - u64::from(state.last_end.is_some());
                ends_hash = taken_up(ends, NPY_HEADER as u64, NPY_HEADER as u64 + 8 * written, &state.ends_checksum)?;
            }
        }
        file.stay(!begins);
        let ends = ends.map(|mut file| {
            file.stay(!begins);
            Ends { file, waiting: Vec::new(), hash: ends_hash }
        });
        Ok(Self { file, ends, dtype, head, hash, state })
    }

    pub fn append(&mut self, ids: &[u8], known: Known, ends: impl Iterator<Item = u64>) -> Result<()> {
        let before = self.state.tokens;
        if self.ends.is_some() {
            for end in ends {
                self.end_at(before + end)?;
            }
        }
        let state = &mut self.state;
        state.documents += known.documents;
        state.open = known.open || (state.open && known.documents == 0);
        state.tokens += (ids.len() / self.dtype.size()) as u64;
        state.text_bytes += known.text_bytes;
        state.max_id = state.max_id.max(known.max_id);
        self.hash.write(ids);
        self.file.write(ids)
    }

    /// A document ends before token `end`.
    pub fn end_at(&mut self, end: u64) -> Result<()> {
        let Some(ends) = &mut self.ends else { return Ok(()) };
        if let Some(before) = self.state.last_end.replace(end) {
            ends.waiting.extend(before.to_le_bytes());
            if ends.waiting.len() >= ENDS_AT_ONCE {
                ends.write_out()?;
            }
        }
        Ok(())
    }

    pub fn end_document(&mut self) -> Result<()> {
        self.end_at(self.state.tokens)?;
        self.state.documents += 1;
        self.state.open = false;
        Ok(())
    }

    /// What it holds, all of which has been given to the system.
    pub fn state(&mut self) -> Result<FileState> {
        if let Some(ends) = &mut self.ends {
            ends.write_out()?;
            self.state.ends_checksum = checksum_text(&ends.hash);
        }
        self.state.checksum = checksum_text(&self.hash);
        Ok(self.state.clone())
    }

    pub fn handles(&self) -> Vec<Arc<OpenFile>> {
        [Some(&self.file), self.ends.as_ref().map(|ends| &ends.file)]
            .into_iter()
            .flatten()
            .map(AtomicFile::handle)
            .collect()
    }

    /// Completes the file under its temporary name; it is still to be brought to the disk.
    pub fn finish(mut self) -> Result<(FileState, Vec<Arc<OpenFile>>)> {
        let open = self.state.open;
        if open {
            self.end_document()?;
        } else if let Some(last) = &mut self.state.last_end {
            // White space behind the last document.
            self.state.tail = self.state.tokens - *last;
            *last = self.state.tokens;
        }
        if let (Some(last), Some(ends)) = (self.state.last_end, &mut self.ends) {
            ends.waiting.extend(last.to_le_bytes());
        }
        let mut state = self.state()?;
        (state.last_end, state.open) = (None, open);
        if self.head > 0 {
            self.file.write_head(&npy_header(self.dtype.descr(), state.tokens))?;
        }
        if let Some(ends) = &mut self.ends {
            ends.file.write_head(&npy_header("<i8", state.documents))?;
            state.ends_checksum = checksum_of_file(ends.file.partial(), 0)?;
        }
        let handles = self.handles();
        self.stay(true);
        Ok((state, handles))
    }

    pub fn stay(&mut self, stays: bool) {
        self.file.stay(stays);
        if let Some(ends) = &mut self.ends {
            ends.file.stay(stays);
        }
    }
}

/// Goes on with a file that must still hold what it did.
fn taken_up(file: &mut AtomicFile, from: u64, len: u64, checksum: &str) -> Result<Xxh3> {
    let hash = hash_of_file(file.partial(), from, len)?;
    let found = fs::metadata(file.partial()).map_or(0, |m| m.len());
    if found < len || checksum_text(&hash) != checksum {
        return Err(damaged(file.partial(), found, len));
    }
    file.cut(len)?;
    Ok(hash)
}

pub(super) fn damaged(path: &Path, found: u64, len: u64) -> Error {
    let what = if found < len { format!("holds {found} bytes, not {len}") } else { "has other bytes".into() };
    let what = format!("{what} as an unfinished run wrote them; expected them unchanged, or --overwrite to begin anew");
    Error::format(path.display().to_string(), what)
}

/// Bytes of a file's header: `.bin` is raw, anything else `.npy`.
pub(super) fn head_of(path: &Path) -> u64 {
    if path.extension().is_none_or(|e| e != "bin") { NPY_HEADER as u64 } else { 0 }
}

/// Where the ends of a token file's documents lie.
pub(super) fn ends_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".documents.npy");
    name.into()
}

/// `train.npy` with a word behind its stem: `train_val.npy`, `train_00000.npy`.
pub(super) fn with_word(path: &Path, word: &str) -> PathBuf {
    let mut name = path.file_stem().unwrap_or_default().to_owned();
    name.push("_");
    name.push(word);
    if let Some(extension) = path.extension() {
        name.push(".");
        name.push(extension);
    }
    path.with_file_name(name)
}

pub(super) fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into()
}
