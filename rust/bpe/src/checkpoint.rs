//! Training that survives Ctrl-C, `kill -9` and a power cut: what is counted and what is merged, on disk.
//!
//! In: counts, a place in the inputs, merges. Out: two files that are replaced atomically, and what they said when they
//! are read again. Called by `trainer`.
//!
//! `FILE` holds counts: all text before one place between two chunks, later all text. `FILE.merges` holds the merges
//! done so far; it is small, and written more often. Words as the tokens that these merges make, with counts of the
//! whole text, are all that training is about to know at that point, so that it goes on to the same result. Both files
//! carry the settings and inputs of their run, and a checksum. Both are deleted when the result is saved.
//!
//! Layout: magic, version, length of the head, head (JSON), body, XXH3 of all that; numbers are little-endian u64, those
//! of words LEB128.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::atomic::{AtomicFile, check_output};
use crate::count::WordCounts;
use crate::error::{Error, Result};
use crate::input::Position;
use crate::train::Pair;

const MAGIC: &[u8; 16] = b"bytekiln bpe-ck\n";
const VERSION: u64 = 1;
/// Bytes that are collected before they are written.
const BUFFER: usize = 1 << 20;

/// A setting or an input by its name, and what it is.
pub type Setting = (String, String);

/// Which of the two files.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    #[default]
    Counts,
    Merges,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Head {
    kind: Kind,
    settings: Vec<Setting>,
    /// Up to where the inputs are counted; none: to their end.
    position: Option<Position>,
    /// Bytes of text before it.
    text_bytes: u64,
    /// Words, or merges, in the body.
    items: u64,
    ties: u64,
}

/// The merges that a run has done, without those of a tokenizer that it extends.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Done {
    /// In their order.
    pub pairs: Vec<Pair>,
    /// How often each pair occurred.
    pub counts: Vec<u64>,
    /// How often the tie rule decided.
    pub ties: u64,
}

/// What an earlier process left.
#[derive(Debug, Default)]
pub struct State {
    /// Counts of all text before `position`.
    pub counts: WordCounts,
    /// Where counting goes on; none: it is over.
    pub position: Option<Position>,
    /// Bytes of text before it.
    pub text_bytes: u64,
    /// Merges done; none while counting is not over.
    pub done: Done,
}

/// Where a run is kept, and when it was kept last.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    settings: Vec<Setting>,
    every: Duration,
    last: Instant,
}

/// The second file.
fn merges_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".merges");
    name.into()
}

/// An input as a setting: its name, size and time of its last change.
pub fn input(number: usize, path: &Path) -> Result<Setting> {
    let found = fs::metadata(path).map_err(|e| Error::io(path, &e))?;
    let changed = found.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
    let whole = fs::canonicalize(path).unwrap_or_else(|_| path.into());
    let value = format!("{} of {} bytes, changed at {} ns", whole.display(), found.len(), changed.as_nanos());
    Ok((format!("input {number}"), value))
}

impl Checkpoint {
    /// Takes up what is at `path`, or begins.
    ///
    /// # Errors
    /// A file that is no checkpoint or a broken one; one of a run with other settings or inputs, the first of which is
    /// named; a folder that is not there.
    pub fn open(path: &Path, settings: Vec<Setting>, every: Duration) -> Result<(Self, State)> {
        check_output(path, true)?;
        let this = Self { path: path.into(), settings, every, last: Instant::now() };
        let mut state = State { position: Some(Position::default()), ..State::default() };
        if let Some((head, body)) = this.read(path, Kind::Counts)? {
            let mut rest = &body[..];
            for _ in 0..head.items {
                let word = number(&mut rest).and_then(|len| rest.split_off(..usize::try_from(len).ok()?));
                let (Some(word), Some(count)) = (word, number(&mut rest)) else { return Err(broken(path)) };
                state.counts.add_many(word, count);
            }
            (state.position, state.text_bytes) = (head.position, head.text_bytes);
        }
        if state.position.is_none()
            && let Some((head, body)) = this.read(&merges_path(path), Kind::Merges)?
        {
            let (items, []) = body.as_chunks::<16>() else { return Err(broken(&merges_path(path))) };
            for &[a, b, c, d, e, f, g, h, ref count @ ..] in items {
                state.done.pairs.push((u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])));
                state.done.counts.push(count.iter().rev().fold(0, |n, &byte| n << 8 | u64::from(byte)));
            }
            state.done.ties = head.ties;
        }
        Ok((this, state))
    }

    /// Whether it is time to save.
    pub fn is_due(&self) -> bool {
        self.last.elapsed() >= self.every
    }

    /// When it will be time to save.
    pub fn due(&self) -> Instant {
        self.last + self.every
    }

    /// Saves the counts of all text before `position`, so many bytes; none: of all text.
    pub fn save_counts(&mut self, counts: &WordCounts, position: Option<Position>, text_bytes: u64) -> Result<()> {
        let head = Head { kind: Kind::Counts, position, text_bytes, items: counts.len() as u64, ..Head::default() };
        let mut file = self.begin(&self.path, head)?;
        counts.for_each(|word, count| {
            file.number(word.len() as u64);
            file.buffer.extend_from_slice(word);
            file.number(count);
            file.flush(BUFFER)
        })?;
        self.end(file)
    }

    /// Saves the merges done so far.
    pub fn save_merges(&mut self, pairs: &[Pair], counts: &[u64], ties: u64) -> Result<()> {
        let head = Head { kind: Kind::Merges, items: pairs.len() as u64, ties, ..Head::default() };
        let mut file = self.begin(&merges_path(&self.path), head)?;
        for (&(a, b), count) in pairs.iter().zip(counts) {
            file.buffer.extend([a.to_le_bytes(), b.to_le_bytes()].concat());
            file.buffer.extend(count.to_le_bytes());
            file.flush(BUFFER)?;
        }
        self.end(file)
    }

    fn begin(&self, path: &Path, head: Head) -> Result<Sealed> {
        let head = Head { settings: self.settings.clone(), ..head };
        let head = serde_json::to_vec(&head).map_err(|e| Error::format(path.display().to_string(), e.to_string()))?;
        let (file, mut buffer) = (AtomicFile::create(path, true)?, MAGIC.to_vec());
        buffer.extend(VERSION.to_le_bytes());
        buffer.extend((head.len() as u64).to_le_bytes());
        buffer.extend(head);
        Ok(Sealed { file, buffer, checksum: Xxh3::new() })
    }

    fn end(&mut self, mut file: Sealed) -> Result<()> {
        file.flush(0)?;
        file.file.write(&file.checksum.digest().to_le_bytes())?;
        file.file.commit()?;
        self.last = Instant::now();
        Ok(())
    }

    /// Head and body of a file; none where there is no file.
    fn read(&self, path: &Path, kind: Kind) -> Result<Option<(Head, Vec<u8>)>> {
        let place = path.display();
        let mut bytes = match fs::read(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            read => read.map_err(|e| Error::io(path, &e))?,
        };
        if !bytes.starts_with(MAGIC) {
            let what = "is no checkpoint of a training run; expected one, or a name that is free";
            return Err(Error::format(place.to_string(), what));
        }
        let split = bytes.len().saturating_sub(8);
        let checksum = bytes.split_off(split);
        if xxh3_64(&bytes).to_le_bytes() != checksum[..] {
            return Err(broken(path));
        }
        let at = |from: usize| bytes.get(from..from + 8).and_then(|n| n.try_into().ok()).map(u64::from_le_bytes);
        let version = at(16).ok_or_else(|| broken(path))?;
        if version != VERSION {
            let what = format!("version {version} of the format; expected {VERSION}, of this version of bytekiln");
            return Err(Error::format(place.to_string(), what));
        }
        let head = at(24).and_then(|len| 32usize.checked_add(usize::try_from(len).ok()?));
        let split = head.filter(|&end| end <= bytes.len()).ok_or_else(|| broken(path))?;
        let body = bytes.split_off(split);
        let head: Head = serde_json::from_slice(&bytes[32..]).map_err(|_| broken(path))?;
        if head.kind != kind {
            return Err(broken(path));
        }
        self.compare(path, &head.settings)?;
        Ok(Some((head, body)))
    }

    /// Refuses a file of another run.
    fn compare(&self, path: &Path, found: &[Setting]) -> Result<()> {
        let none = || ("inputs".to_string(), "fewer".to_string());
        for n in 0..found.len().max(self.settings.len()) {
            let theirs = found.get(n).cloned().unwrap_or_else(none);
            let ours = self.settings.get(n).cloned().unwrap_or_else(none);
            if theirs != ours {
                return Err(Error::Config(format!(
                    "{}: is of a run with {} {}; found {} {}; expected the same, another checkpoint, or none there (delete it to begin anew)",
                    path.display(),
                    theirs.0,
                    theirs.1,
                    ours.0,
                    ours.1
                )));
            }
        }
        Ok(())
    }
}

fn broken(path: &Path) -> Error {
    Error::format(path.display().to_string(), "a broken checkpoint; expected a whole one (delete it to begin anew)")
}

/// A number of up to 64 bits, seven bits a byte, the lowest first.
fn number(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, more) = rest.split_first()?;
        *rest = more;
        value |= u64::from(byte & 127) << shift;
        if byte < 128 {
            return Some(value);
        }
    }
    None
}

/// A file that is written with its checksum.
struct Sealed {
    file: AtomicFile,
    buffer: Vec<u8>,
    checksum: Xxh3,
}

impl Sealed {
    fn number(&mut self, mut value: u64) {
        while value >= 128 {
            self.buffer.push(value as u8 | 128);
            value >>= 7;
        }
        self.buffer.push(value as u8);
    }

    /// Writes what was collected once it is more than `most` bytes.
    fn flush(&mut self, most: usize) -> Result<()> {
        if self.buffer.len() > most {
            self.checksum.update(&self.buffer);
            self.file.write(&self.buffer)?;
            self.buffer.clear();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(seed: &str) -> Vec<Setting> {
        vec![("pattern".into(), "gpt2".into()), ("input 1".into(), seed.into())]
    }

    fn open(path: &Path, settings: Vec<Setting>) -> Result<State> {
        Checkpoint::open(path, settings, Duration::from_secs(30)).map(|opened| opened.1)
    }

    #[test]
    fn what_was_saved_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.ck");
        let (mut kept, fresh) = Checkpoint::open(&path, settings("a"), Duration::ZERO).unwrap();
        assert!(fresh.counts.is_empty() && fresh.position == Some(Position::default()));
        let mut counts = WordCounts::default();
        let long = vec![7; 300];
        for (word, count) in [(&b"the"[..], 1), (b" kiln", u64::MAX), (&long, 128)] {
            counts.add_many(word, count);
        }
        let at = Position { file: 1, offset: 1 << 40, room: Some(7) };
        kept.save_counts(&counts, Some(at), 99).unwrap();
        let state = open(&path, settings("a")).unwrap();
        assert_eq!((state.position, state.text_bytes, state.done), (Some(at), 99, Done::default()));
        assert_eq!(state.counts.into_sorted(), counts.clone().into_sorted());
        kept.save_counts(&counts, None, 100).unwrap();
        let done = Done { pairs: vec![(97, 98), (256, 70_000)], counts: vec![u64::MAX, 3], ties: 5 };
        kept.save_merges(&done.pairs, &done.counts, done.ties).unwrap();
        let state = open(&path, settings("a")).unwrap();
        assert_eq!((state.position, state.done), (None, done));
    }

    #[test]
    fn another_run_and_a_broken_file_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.ck");
        let (mut kept, _) = Checkpoint::open(&path, settings("a"), Duration::ZERO).unwrap();
        let mut counts = WordCounts::default();
        counts.add_many(b"the", 3);
        kept.save_counts(&counts, None, 100).unwrap();
        let said = open(&path, settings("b")).unwrap_err().to_string();
        assert!(said.contains("input 1 a; found input 1 b"), "{said}");
        let said = open(&path, settings("a")[..1].to_vec()).unwrap_err().to_string();
        assert!(said.contains("input 1 a; found inputs fewer"), "{said}");
        let whole = fs::read(&path).unwrap();
        for n in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[n] ^= 1;
            fs::write(&path, flipped).unwrap();
            assert!(matches!(open(&path, settings("a")), Err(Error::Format { .. })), "byte {n} flipped");
            fs::write(&path, &whole[..n]).unwrap();
            assert!(matches!(open(&path, settings("a")), Err(Error::Format { .. })), "cut at {n}");
        }
    }
}
