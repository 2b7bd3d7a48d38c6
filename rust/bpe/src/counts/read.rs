//! The bytes of a counts file → its words, as a stream that believes nothing it has not checked.
//!
//! In: a file. Out: its head and totals at once, then its words in ascending order. Memory: one block. Every length is
//! covered by a checksum that is looked at first. Called by `runs`, `merge` and `tally`.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use twox_hash::XxHash3_64;

use super::about::{About, BLOCK, BLOCK_HEAD, END, LONGEST_HEAD, MAGIC, TRAILER, Totals, VERSION};
use super::merge::Sorted;
use super::write::trailer;
use crate::error::{Error, Result};

/// A counts file, open; as a run it has no name, and `path` is its folder.
#[derive(Debug)]
pub(super) struct Stored {
    file: File,
    pub(super) path: PathBuf,
    pub(super) about: About,
    pub(super) totals: Totals,
    seed: u64,
    /// Where the blocks begin and end.
    blocks: std::ops::Range<u64>,
}

impl Stored {
    /// Opens a counts file and checks its head and its end.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io(path, &e))?;
        Self::of(file, path)
    }

    /// The same for an open file.
    pub(super) fn of(file: File, path: &Path) -> Result<Self> {
        let found = file.metadata().map_err(|e| Error::io(path, &e))?;
        if found.is_dir() {
            return Err(Error::File { path: path.into(), what: "is a directory; expected a counts file".into() });
        }
        let size = found.len();
        let bad = |what: String| Error::format(path.display().to_string(), what);
        let mut start = [0; 24];
        let foreign = || bad("is no counts file; expected one that bpe-count has written".into());
        if size < start.len() as u64 {
            return Err(foreign());
        }
        read_at(&file, path, &mut start, 0)?;
        if &start[..16] != MAGIC {
            return Err(foreign());
        }
        let (version, length) = (u32_at(&start, 16), u32_at(&start, 20) as usize);
        if version > VERSION {
            let what =
                format!("version {version} of counts files; expected {VERSION}: a newer bytekiln has written it");
            return Err(bad(what));
        }
        if version == 0 {
            return Err(bad("version 0 of counts files; expected 1".into()));
        }
        let left = size - start.len() as u64;
        if length > LONGEST_HEAD || (length + 8 + TRAILER) as u64 > left {
            let what = format!("byte offset 20: a head of {length} bytes, {left} follow; expected a whole counts file");
            return Err(bad(what));
        }
        let mut head = start.to_vec();
        head.resize(start.len() + length + 8, 0);
        read_at(&file, path, &mut head[start.len()..], start.len() as u64)?;
        let (covered, check) = head.split_at(start.len() + length);
        let seed = XxHash3_64::oneshot(covered);
        if check != seed.to_le_bytes() {
            return Err(bad("the head's checksum does not fit; expected an undamaged file".into()));
        }
        let json = &covered[start.len()..];
        let about: About =
            serde_json::from_slice(json).map_err(|e| bad(format!("the head: {e}; expected version 1")))?;
        let (from, to) = (head.len() as u64, size - TRAILER as u64);
        let mut end = [0; TRAILER];
        read_at(&file, path, &mut end, to)?;
        let total = |i: usize| u64_at(&end, 8 * i);
        let totals = Totals { words: total(0), pretokens: total(1), word_bytes: total(2), blocks: total(3) };
        if &end[40..] != END || trailer(&totals, seed ^ to) != end {
            let what = format!("byte offset {to}: found no end; expected a whole file: it was cut off or is damaged");
            return Err(bad(what));
        }
        if totals.pretokens != about.pretokens {
            let what = format!("byte offset {to}: {} words; expected {}", totals.pretokens, about.pretokens);
            return Err(bad(what));
        }
        Ok(Self { file, path: path.into(), about, totals, seed, blocks: from..to })
    }

    /// Its words, from the first one.
    pub(super) fn reader(self: Arc<Self>) -> Reader {
        Reader {
            at: self.blocks.start,
            stored: self,
            seen: Totals::default(),
            in_block: 0,
            raw: Vec::new(),
            pos: 0,
            packed: Vec::new(),
            word: Vec::new(),
            count: 0,
        }
    }
}

/// Reads a counts file once.
pub(super) struct Reader {
    stored: Arc<Stored>,
    /// Offset of the next block.
    at: u64,
    seen: Totals,
    /// Words of this block that were not read yet.
    in_block: u32,
    raw: Vec<u8>,
    pos: usize,
    packed: Vec<u8>,
    word: Vec<u8>,
    count: u64,
}

impl Reader {
    fn bad(&self, what: &str) -> Error {
        let Self { stored, at, seen, .. } = self;
        Error::format(
            format!("{}: block {} at byte offset {at}", stored.path.display(), seen.blocks),
            format!("{what}; expected an undamaged counts file"),
        )
    }

    fn next_block(&mut self) -> Result<()> {
        let left = self.stored.blocks.end - self.at;
        if left < BLOCK_HEAD as u64 {
            return Err(self.bad(&format!("{left} bytes are too few")));
        }
        let mut head = [0; BLOCK_HEAD];
        read_at(&self.stored.file, &self.stored.path, &mut head, self.at)?;
        if u64_at(&head, 20) != XxHash3_64::oneshot_with_seed(self.stored.seed ^ self.at, &head[..20]) {
            return Err(self.bad("the checksum of its head does not fit"));
        }
        let (raw, packed, words) = (u32_at(&head, 0) as usize, u32_at(&head, 4) as usize, u32_at(&head, 8));
        if packed as u64 > left - BLOCK_HEAD as u64 || words == 0 {
            return Err(self.bad(&format!("found {packed} bytes with {words} words, {left} bytes follow")));
        }
        self.packed.resize(packed, 0);
        read_at(&self.stored.file, &self.stored.path, &mut self.packed, self.at + BLOCK_HEAD as u64)?;
        if u64_at(&head, 12) != XxHash3_64::oneshot(&self.packed) {
            return Err(self.bad("the checksum of its words does not fit"));
        }
        // Asked for before it is allocated: what zstd itself says of the size.
        if !matches!(zstd::zstd_safe::get_frame_content_size(&self.packed), Ok(Some(n)) if n == raw as u64) {
            return Err(self.bad("its size does not fit"));
        }
        self.raw.clear();
        self.raw.resize(raw, 0);
        match zstd::bulk::decompress_to_buffer(&self.packed, &mut self.raw) {
            Ok(n) if n == raw => {}
            Ok(n) => return Err(self.bad(&format!("found {n} bytes in it, {raw} were said"))),
            Err(e) => return Err(self.bad(&format!("it cannot be unpacked: {e}"))),
        }
        self.at += (BLOCK_HEAD + packed) as u64;
        self.seen.blocks += 1;
        (self.in_block, self.pos) = (words, 0);
        if packed > 4 * BLOCK {
            self.packed = Vec::new();
        }
        Ok(())
    }

    /// The next number of the block; `None` where it ends too early or is larger than 64 bits.
    fn varint(&mut self) -> Option<u64> {
        let mut n = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = *self.raw.get(self.pos)?;
            self.pos += 1;
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits {
                return None;
            }
            n |= bits << shift;
            if byte < 0x80 {
                return Some(n);
            }
        }
        None
    }

    /// Reads one word of the block.
    fn entry(&mut self, first: bool) -> Option<()> {
        let common = usize::try_from(self.varint()?).ok()?;
        let rest = usize::try_from(self.varint()?).ok()?;
        let suffix = self.pos..self.pos.checked_add(rest)?;
        if common > self.word.len() || (first && common > 0) {
            return None;
        }
        let suffix = self.raw.get(suffix)?;
        // Ascending: behind what is common, greater than the rest of the word before, or longer.
        let ascends = self.seen.words == 0 || if first { suffix > &*self.word } else { suffix > &self.word[common..] };
        if !ascends || common + rest == 0 {
            return None;
        }
        self.word.truncate(if first { 0 } else { common });
        self.word.extend_from_slice(suffix);
        self.pos += rest;
        self.count = self.varint()?;
        self.seen.words += 1;
        self.seen.word_bytes += self.word.len() as u64;
        self.seen.pretokens = self.seen.pretokens.checked_add(self.count)?;
        (self.count > 0).then_some(())
    }
}

impl Sorted for Reader {
    fn advance(&mut self) -> Result<bool> {
        let first = self.in_block == 0;
        if first {
            if self.pos != self.raw.len() {
                return Err(self.bad("more bytes than words before it"));
            }
            if self.at == self.stored.blocks.end {
                if self.seen == self.stored.totals {
                    return Ok(false);
                }
                return Err(self.bad("the words before do not add up to the totals"));
            }
            self.next_block()?;
        }
        self.in_block -= 1;
        if self.entry(first).is_none() {
            return Err(self.bad("a malformed word before it"));
        }
        Ok(true)
    }

    fn word(&self) -> &[u8] {
        &self.word
    }

    fn count(&self) -> u64 {
        self.count
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().rev().fold(0, |n, &byte| n << 8 | u32::from(byte))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().rev().fold(0, |n, &byte| n << 8 | u64::from(byte))
}

/// Fills `buffer` from a place of the file; a file may be read by several threads at once.
fn read_at(file: &File, path: &Path, buffer: &mut [u8], offset: u64) -> Result<()> {
    read_exact_at(file, buffer, offset).map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => Error::format(
            path.display().to_string(),
            format!("byte offset {offset}: it ends; expected a file that stays"),
        ),
        _ => Error::io(path, &e),
    })
}

#[cfg(unix)]
fn read_exact_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !buffer.is_empty() {
        let n = std::os::windows::fs::FileExt::seek_read(file, buffer, offset)?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buffer = &mut buffer[n..];
        offset += n as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::write::{Sink, Writer};
    use super::*;
    use crate::pretokenize::{Pattern, Splitter, TextPolicy};
    use proptest::prelude::*;
    use std::io::Write as _;

    impl Sink for Vec<u8> {
        fn put(&mut self, bytes: &[u8]) -> Result<()> {
            self.extend_from_slice(bytes);
            Ok(())
        }
    }

    fn about(pretokens: u64) -> About {
        let splitter = Splitter::new(Pattern::new("gpt2").unwrap().into(), &[]).unwrap();
        About { pretokens, ..About::new(&splitter, TextPolicy::Error) }
    }

    fn words_of(bytes: &[u8]) -> Result<Vec<(Vec<u8>, u64)>> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        let mut reader = Arc::new(Stored::of(file, Path::new("f"))?).reader();
        let mut words = vec![];
        while reader.advance()? {
            words.push((reader.word().to_vec(), reader.count()));
        }
        Ok(words)
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(words in prop::collection::btree_map(
            prop_oneof![4 => prop::collection::vec(any::<u8>(), 1..40), 1 => prop::collection::vec(0u8..2, 60_000..140_000)],
            prop_oneof![1u64..9, any::<u32>().prop_map(|n| u64::from(n) + 1)],
            0..40,
        )) {
            let mut writer = Writer::new(Vec::new(), &about(words.values().sum())).unwrap();
            for (word, &count) in &words {
                writer.push(word, count).unwrap();
            }
            prop_assert_eq!(words_of(&writer.finish().unwrap()).unwrap(), words.into_iter().collect::<Vec<_>>());
        }

        /// Blocks that bear the right checksums but hold anything: an error, or words in order; never a panic.
        #[test]
        fn a_well_wrapped_block_of_nonsense_is_an_error(
            raw in prop::collection::vec(prop_oneof![0u8..4, any::<u8>()], 1..60),
            words in 0u32..8,
            said in prop_oneof![4 => Just(None), 1 => any::<u32>().prop_map(Some)],
        ) {
            let whole = Writer::new(Vec::new(), &about(3)).unwrap().finish().unwrap();
            let mut bytes = whole[..whole.len() - TRAILER].to_vec();
            let seed = u64_at(&bytes, bytes.len() - 8);
            let packed = zstd::bulk::compress(&raw, 1).unwrap();
            let mut head = vec![];
            for n in [said.unwrap_or(raw.len() as u32), packed.len() as u32, words] {
                head.extend_from_slice(&n.to_le_bytes());
            }
            head.extend_from_slice(&XxHash3_64::oneshot(&packed).to_le_bytes());
            head.extend_from_slice(&XxHash3_64::oneshot_with_seed(seed ^ bytes.len() as u64, &head).to_le_bytes());
            bytes.extend(head);
            bytes.extend(packed);
            let totals = Totals { words: words.into(), pretokens: 3, word_bytes: 5, blocks: 1 };
            bytes.extend(trailer(&totals, seed ^ bytes.len() as u64));
            match words_of(&bytes) {
                Ok(words) => prop_assert_eq!(words.iter().map(|word| word.1).sum::<u64>(), 3),
                Err(error) => prop_assert!(error.to_string().starts_with("f: block "), "{}", error),
            }
        }
    }
}
