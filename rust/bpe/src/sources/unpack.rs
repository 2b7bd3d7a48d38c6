//! Packed bytes → the bytes they stand for: gzip, zstd, xz, bzip2, several members one behind the other.
//!
//! In: a file or standard input. Out: a [`Stream`] of its unpacked bytes, and how far the file itself is read.
//! Recognised by the first bytes. Memory is the formats' own window (at most 128 MiB for zstd, a limit of 512 MiB
//! for xz), however much comes out. Called by `text` and `jsonl`.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Cursor, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use liblzma::stream::{CONCATENATED, Stream as XzStream};

use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::sources::find::Found;
use crate::sources::pipe::Pipe;

/// Memory that an xz file may ask for; `xz -9` asks for 65 MiB.
const XZ_MEMORY: u64 = 512 << 20;
/// Bytes of a packed file that are read at once.
const BLOCK: usize = 128 << 10;
/// Bytes of text between two looks at whether to stop: bzip2 unpacks as many in 30 ms.
const AT_ONCE: usize = 1 << 20;
/// Bytes that tell every format.
const HEAD: usize = 10;

/// How a file is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Packing {
    Gzip,
    Zstd,
    Xz,
    Bzip2,
}

impl Packing {
    /// By the last part of a name, in lower case.
    pub fn of_ending(ending: &str) -> Option<Self> {
        match ending {
            "gz" => Some(Self::Gzip),
            "zst" => Some(Self::Zstd),
            "xz" => Some(Self::Xz),
            "bz2" => Some(Self::Bzip2),
            _ => None,
        }
    }

    /// By a file's first bytes. None of these is UTF-8 text, but for zstd's skippable frames and bzip2; those ask
    /// for more bytes than chance would give.
    fn of_head(head: &[u8]) -> Option<Self> {
        let bzip2 = |head: &[u8]| {
            head.starts_with(b"BZh")
                && (head[4..].starts_with(b"1AY&SY") || head[4..].starts_with(b"\x17rE8P\x90"))
                && head[3].is_ascii_digit()
        };
        match head {
            [0x1f, 0x8b, ..] => Some(Self::Gzip),
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Some(Self::Zstd),
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Some(Self::Xz),
            _ if head.len() == HEAD && bzip2(head) => Some(Self::Bzip2),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
            Self::Xz => "xz",
            Self::Bzip2 => "bzip2",
        }
    }

    fn unpack<'a>(self, packed: impl BufRead + Send + 'a) -> io::Result<Box<dyn Read + Send + 'a>> {
        Ok(match self {
            Self::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(packed)),
            Self::Zstd => Box::new(zstd::stream::read::Decoder::with_buffer(packed)?),
            Self::Xz => {
                let stream = XzStream::new_stream_decoder(XZ_MEMORY, CONCATENATED)?;
                Box::new(liblzma::bufread::XzDecoder::new_stream(packed, stream))
            }
            Self::Bzip2 => Box::new(bzip2::bufread::MultiBzDecoder::new(packed)),
        })
    }
}

/// Counts the packed bytes that were taken, for progress and for the place of an error.
struct Meter<R> {
    inner: BufReader<R>,
    used: Arc<AtomicU64>,
}

impl<R: Read> Read for Meter<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(out)?;
        self.used.fetch_add(read as u64, Relaxed);
        Ok(read)
    }
}

impl<R: Read> BufRead for Meter<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.inner.fill_buf()
    }

    fn consume(&mut self, amount: usize) {
        self.used.fetch_add(amount as u64, Relaxed);
        self.inner.consume(amount);
    }
}

enum Reader<'a> {
    /// Read without a layer in between: the common case, and the fastest.
    Plain(File),
    Other(Box<dyn Read + Send + 'a>),
}

/// The unpacked bytes of a file.
pub(crate) struct Stream<'a> {
    path: PathBuf,
    reader: Reader<'a>,
    packing: Option<Packing>,
    used: Arc<AtomicU64>,
    produced: u64,
    progress: Option<&'a Progress>,
}

impl<'a> Stream<'a> {
    /// Opens a file. A name that says packed and bytes that say otherwise are refused.
    pub fn open(found: &Found, progress: Option<&'a Progress>) -> Result<Self> {
        let path = &found.path;
        let fail = |e| Error::io(path, &e);
        let used = Arc::new(AtomicU64::new(0));
        let (head, reader): (Vec<u8>, Reader<'a>) = if found.stdin {
            let mut pipe = Pipe::open(progress);
            let head = head_of(&mut pipe).map_err(|e| stopped(progress).unwrap_or_else(|| fail(e)))?;
            (head.clone(), Reader::Other(Box::new(Cursor::new(head).chain(pipe))))
        } else {
            let mut file = open_file(path)?;
            let head = head_of(&mut file).map_err(fail)?;
            file.seek(SeekFrom::Start(0)).map_err(fail)?;
            (head, Reader::Plain(file))
        };
        let packing = Packing::of_head(&head);
        if head.is_empty() {
            return Err(Error::File { path: path.clone(), what: "empty file (0 bytes); expected text".into() });
        }
        if let (Some(named), None) = (found.packing, packing) {
            let what = format!(
                "its first bytes are not {}'s; expected a {0} file, or another name for plain text",
                named.name()
            );
            return Err(Error::format(path.display().to_string(), what));
        }
        let reader = match (packing, reader) {
            (None, reader) => reader,
            (Some(packing), Reader::Plain(file)) => Reader::Other(packed(packing, file, &used).map_err(fail)?),
            (Some(packing), Reader::Other(pipe)) => Reader::Other(packed(packing, pipe, &used).map_err(fail)?),
        };
        Ok(Self { path: path.clone(), reader, packing, used, produced: 0, progress })
    }

    /// Reads until `bytes` has `wanted` bytes; `true` where the file ends before.
    ///
    /// # Errors
    /// Of the file; [`Error::Interrupted`] when `progress` says so, looked at every few milliseconds.
    pub fn read_to(&mut self, bytes: &mut Vec<u8>, wanted: usize) -> Result<bool> {
        if bytes.try_reserve_exact(wanted.saturating_sub(bytes.len())).is_err() {
            let what = format!("no memory for a text of {wanted} bytes without a border; expected more memory");
            return Err(Error::File { path: self.path.clone(), what });
        }
        loop {
            stopped(self.progress).map_or(Ok(()), Err)?;
            let before = bytes.len();
            let missing = wanted.saturating_sub(before).min(AT_ONCE);
            let result = match &mut self.reader {
                Reader::Plain(file) => file.take(missing as u64).read_to_end(bytes),
                Reader::Other(reader) => reader.take(missing as u64).read_to_end(bytes),
            };
            self.produced += (bytes.len() - before) as u64;
            let ended = result.map_err(|e| self.explain(&e))? < missing;
            if ended || bytes.len() >= wanted {
                return Ok(ended);
            }
        }
    }

    /// Bytes of the file itself that were read.
    pub fn used(&self) -> u64 {
        if self.packing.is_some() { self.used.load(Relaxed) } else { self.produced }
    }

    /// Goes to a place in the text, before anything was read; `false` where that takes reading.
    pub fn seek(&mut self, to: u64) -> Result<bool> {
        let Reader::Plain(file) = &mut self.reader else { return Ok(false) };
        file.seek(SeekFrom::Start(to)).map_err(|e| Error::io(&self.path, &e))?;
        self.produced = to;
        Ok(true)
    }

    /// What the file is called in messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn explain(&self, error: &io::Error) -> Error {
        if let Some(stopped) = stopped(self.progress) {
            return stopped;
        }
        let (Some(packing), None) = (self.packing, error.raw_os_error()) else { return Error::io(&self.path, error) };
        let place = format!("{}: byte {} of the file", self.path.display(), self.used.load(Relaxed));
        let (name, text) = (packing.name(), self.produced);
        let what = if error.kind() == io::ErrorKind::UnexpectedEof {
            format!("the {name} data end in the middle, after {text} bytes of text; expected a whole file")
        } else {
            format!("corrupt {name} data after {text} bytes of text ({error}); expected an intact file")
        };
        Error::format(place, what)
    }
}

fn packed<'a>(
    packing: Packing,
    file: impl Read + Send + 'a,
    used: &Arc<AtomicU64>,
) -> io::Result<Box<dyn Read + Send + 'a>> {
    packing.unpack(Meter { inner: BufReader::with_capacity(BLOCK, file), used: used.clone() })
}

fn stopped(progress: Option<&Progress>) -> Option<Error> {
    progress.and_then(|progress| progress.check().err())
}

fn head_of(reader: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut head = Vec::with_capacity(HEAD);
    reader.take(HEAD as u64).read_to_end(&mut head)?;
    Ok(head)
}

/// Opens a file that is no folder.
pub(crate) fn open_file(path: &Path) -> Result<File> {
    let file = File::open(path).map_err(|e| Error::io(path, &e))?;
    if file.metadata().is_ok_and(|m| m.is_dir()) {
        return Err(Error::File { path: path.into(), what: "is a directory; expected a text file".into() });
    }
    Ok(file)
}
