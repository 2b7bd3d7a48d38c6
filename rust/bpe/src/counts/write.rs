//! Sorted words → the bytes of a counts file (docs/scale.md), as a stream.
//!
//! In: words in ascending order, each with its count. Out: blocks of words that share their beginnings, compressed and
//! checksummed, behind a head and before the totals. Called by `runs` and `tally`.

use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;

use twox_hash::XxHash3_64;
use zstd::bulk::Compressor;

use super::about::{About, BLOCK, BLOCK_HEAD, END, MAGIC, Totals, VERSION, add};
use crate::atomic::AtomicFile;
use crate::error::{Error, Result};

/// zstd's fastest: levels above pack words that already share their beginnings little better.
const LEVEL: i32 = 1;

/// Where the bytes go.
pub(super) trait Sink {
    /// Appends bytes.
    fn put(&mut self, bytes: &[u8]) -> Result<()>;
}

impl Sink for AtomicFile {
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.write(bytes)
    }
}

/// A run: a file without a name in a folder.
#[derive(Debug)]
pub(super) struct Unnamed {
    pub(super) file: File,
    pub(super) folder: PathBuf,
}

impl Unnamed {
    /// A new one.
    pub(super) fn create(folder: &std::path::Path) -> Result<Self> {
        let file = tempfile::tempfile_in(folder).map_err(|e| Error::io(folder, &e))?;
        Ok(Self { file, folder: folder.into() })
    }
}

impl Sink for Unnamed {
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|e| Error::io(&self.folder, &e))
    }
}

/// Writes one counts file.
pub(super) struct Writer<S> {
    sink: S,
    /// Checksum of the head, which every other one begins with: blocks of another file do not fit.
    seed: u64,
    offset: u64,
    raw: Vec<u8>,
    packed: Vec<u8>,
    last: Vec<u8>,
    in_block: u32,
    totals: Totals,
    packer: Compressor<'static>,
}

impl<S: Sink> Writer<S> {
    /// Writes the head.
    pub(super) fn new(mut sink: S, about: &About) -> Result<Self> {
        let json = serde_json::to_vec(about).map_err(|e| Error::Config(format!("counts: {e}; expected plain text")))?;
        let mut head = Vec::with_capacity(json.len() + 32);
        head.extend_from_slice(MAGIC);
        head.extend_from_slice(&VERSION.to_le_bytes());
        head.extend_from_slice(&(json.len() as u32).to_le_bytes());
        head.extend_from_slice(&json);
        let seed = XxHash3_64::oneshot(&head);
        head.extend_from_slice(&seed.to_le_bytes());
        sink.put(&head)?;
        Ok(Self {
            sink,
            seed,
            offset: head.len() as u64,
            raw: Vec::new(),
            packed: Vec::new(),
            last: Vec::new(),
            in_block: 0,
            totals: Totals::default(),
            packer: Compressor::new(LEVEL).map_err(|e| Error::Config(format!("zstd: {e}; expected memory for it")))?,
        })
    }

    /// Appends a word that comes after the last one, with a count of 1 or more.
    pub(super) fn push(&mut self, word: &[u8], count: u64) -> Result<()> {
        debug_assert!(count > 0 && !word.is_empty() && (self.totals.words == 0 || *word > *self.last));
        if self.in_block > 0 && self.raw.len() + word.len() > BLOCK {
            self.flush()?;
        }
        if word.len() >= u32::MAX as usize - BLOCK {
            return Err(Error::Config(format!(
                "counts: found a word of {} bytes; expected fewer than 4 GiB",
                word.len()
            )));
        }
        // A block can be read without the one before.
        let common = if self.in_block == 0 { 0 } else { common_prefix(&self.last, word) };
        self.last.truncate(common);
        self.last.extend_from_slice(&word[common..]);
        varint(&mut self.raw, common as u64);
        varint(&mut self.raw, (word.len() - common) as u64);
        self.raw.extend_from_slice(&word[common..]);
        varint(&mut self.raw, count);
        self.in_block += 1;
        self.totals.words += 1;
        self.totals.word_bytes += word.len() as u64;
        self.totals.pretokens = add(self.totals.pretokens, count)?;
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        self.packed.clear();
        self.packed.reserve(zstd::zstd_safe::compress_bound(self.raw.len()));
        let packed = self.packer.compress_to_buffer(&self.raw, &mut self.packed);
        packed.map_err(|e| Error::Config(format!("zstd: {e}; expected memory for it")))?;
        let mut head = [0; BLOCK_HEAD];
        head[..4].copy_from_slice(&(self.raw.len() as u32).to_le_bytes());
        head[4..8].copy_from_slice(&(self.packed.len() as u32).to_le_bytes());
        head[8..12].copy_from_slice(&self.in_block.to_le_bytes());
        head[12..20].copy_from_slice(&XxHash3_64::oneshot(&self.packed).to_le_bytes());
        let check = XxHash3_64::oneshot_with_seed(self.seed ^ self.offset, &head[..20]);
        head[20..].copy_from_slice(&check.to_le_bytes());
        self.sink.put(&head)?;
        self.sink.put(&self.packed)?;
        self.offset += (head.len() + self.packed.len()) as u64;
        self.totals.blocks += 1;
        self.in_block = 0;
        self.raw.clear();
        // One long word must not be paid for until the end.
        self.raw.shrink_to(4 * BLOCK);
        self.packed.shrink_to(4 * BLOCK);
        Ok(())
    }

    /// Writes the totals; what is behind them is the caller's.
    pub(super) fn finish(mut self) -> Result<S> {
        if self.in_block > 0 {
            self.flush()?;
        }
        self.sink.put(&trailer(&self.totals, self.seed ^ self.offset))?;
        Ok(self.sink)
    }
}

/// The last bytes of a file.
pub(super) fn trailer(totals: &Totals, seed: u64) -> Vec<u8> {
    let Totals { words, pretokens, word_bytes, blocks } = *totals;
    let mut bytes: Vec<u8> = [words, pretokens, word_bytes, blocks].iter().flat_map(|n| n.to_le_bytes()).collect();
    bytes.extend_from_slice(&XxHash3_64::oneshot_with_seed(seed, &bytes).to_le_bytes());
    bytes.extend_from_slice(END);
    bytes
}

fn common_prefix(a: &[u8], b: &[u8]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// Seven bits a byte, the lowest first; the top bit says that more follow.
fn varint(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}
