//! Token files: ids on disk, `.npy` or raw, with a JSON manifest beside them (`docs/formats.md`).
//!
//! In: ids in order. Out: a file that takes its name only when it is complete. Called by `corpus`.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use crate::atomic::{AtomicFile, check_output, write_file};
use crate::error::{Error, Result};
use crate::train::TokenId;

/// How an id is stored, little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// Two bytes: vocabularies of up to 65,536 tokens.
    Uint16,
    /// Four bytes.
    Uint32,
}

impl Dtype {
    /// The smallest type that holds every id of a vocabulary.
    pub fn for_vocab(size: usize) -> Self {
        if size <= 1 << 16 { Self::Uint16 } else { Self::Uint32 }
    }

    /// The type of a name, refused where the vocabulary does not fit: ids never wrap.
    pub fn from_name(name: &str, vocab_size: usize) -> Result<Self> {
        let dtype = match name {
            "uint16" => Self::Uint16,
            "uint32" => Self::Uint32,
            _ => return Err(Error::Config(format!("dtype: found {name:?}; expected uint16 or uint32"))),
        };
        if dtype == Self::Uint16 && Self::for_vocab(vocab_size) == Self::Uint32 {
            return Err(Error::Config(format!(
                "dtype: uint16 holds ids up to 65535, the vocabulary has {vocab_size} tokens; expected uint32"
            )));
        }
        Ok(dtype)
    }

    /// Bytes an id.
    pub fn size(self) -> usize {
        match self {
            Self::Uint16 => 2,
            Self::Uint32 => 4,
        }
    }

    /// Appends ids as bytes.
    pub fn pack(self, ids: &[TokenId], out: &mut Vec<u8>) {
        let begin = out.len();
        out.resize(begin + ids.len() * self.size(), 0);
        let room = &mut out[begin..];
        match self {
            // Narrowing is exact: `from_name` and `for_vocab` hold ids below 65,536 here.
            Self::Uint16 => {
                for (bytes, &id) in room.as_chunks_mut().0.iter_mut().zip(ids) {
                    *bytes = (id as u16).to_le_bytes();
                }
            }
            Self::Uint32 => {
                for (bytes, &id) in room.as_chunks_mut().0.iter_mut().zip(ids) {
                    *bytes = id.to_le_bytes();
                }
            }
        }
    }
}

/// One input of a token file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// The file's name, without its folder.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// XXH3-128 of its bytes.
    pub checksum: String,
}

/// What stands beside a token file, as `<file>.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Always `bytekiln-tokens`.
    pub format: String,
    /// Version of the manifest.
    pub version: u32,
    /// Name of the token file.
    pub file: String,
    /// How an id is stored.
    pub dtype: Dtype,
    /// Number of ids.
    pub tokens: u64,
    /// Documents: ends of text, and text behind the last one.
    pub documents: u64,
    /// Bytes of text behind the ids, special tokens left out: bits per byte need it.
    pub text_bytes: u64,
    /// Size of the vocabulary.
    pub vocab_size: usize,
    /// Id that ends documents.
    pub eot_id: Option<TokenId>,
    /// Greatest id in the file.
    pub max_id: Option<TokenId>,
    /// Hash of the tokenizer.
    pub tokenizer_hash: String,
    /// XXH3-128 of the ids' bytes (the `.npy` header left out).
    pub checksum: String,
    /// The inputs, in order.
    pub sources: Vec<Source>,
    /// Program and version.
    pub created_by: String,
}

impl Manifest {
    /// The manifest as JSON.
    pub fn to_json(&self) -> Result<String> {
        serde_json::to_string_pretty(self).map_err(|e| Error::format(format!("{}.json", self.file), e.to_string()))
    }
}

/// XXH3-128 of a file's bytes from `offset` on.
pub fn checksum_of_file(path: &Path, offset: u64) -> Result<String> {
    let failed = |e: std::io::Error| Error::io(path, &e);
    let mut file = File::open(path).map_err(failed)?;
    file.seek(SeekFrom::Start(offset)).map_err(failed)?;
    let (mut hash, mut buffer) = (Xxh3::new(), vec![0; 1 << 18]);
    loop {
        match file.read(&mut buffer).map_err(failed)? {
            0 => return Ok(checksum_text(&hash)),
            n => hash.update(&buffer[..n]),
        }
    }
}

/// An XXH3-128 digest in the manifest's spelling.
pub fn checksum_text(hash: &Xxh3) -> String {
    format!("xxh3-128:{:032x}", hash.digest128())
}

/// Where the manifest of a token file lies.
pub fn manifest_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".json");
    name.into()
}

/// Whether the manifest of `path` was left without its token file by a writer that was killed between two renames.
fn is_orphan(path: &Path) -> bool {
    let read = || -> Option<Manifest> { serde_json::from_slice(&std::fs::read(manifest_path(path)).ok()?).ok() };
    !path.exists() && read().is_some_and(|m| path.file_name().is_some_and(|name| m.file == name.to_string_lossy()))
}

/// Length of the `.npy` header that is written: fixed, so that the count can be filled in at the end.
const NPY_HEADER: usize = 128;

/// Writes ids in order; the file appears, complete, in [`finish`](TokenWriter::finish).
pub struct TokenWriter {
    path: PathBuf,
    overwrite: bool,
    file: AtomicFile,
    dtype: Dtype,
    npy: bool,
    tokens: u64,
    hash: Xxh3,
}

impl TokenWriter {
    /// Begins a token file: `.bin` is raw, anything else `.npy`.
    pub fn create(path: &Path, dtype: Dtype, overwrite: bool) -> Result<Self> {
        check_output(&manifest_path(path), overwrite || is_orphan(path))?;
        let mut file = AtomicFile::create(path, overwrite)?;
        let npy = path.extension().is_none_or(|e| e != "bin");
        if npy {
            file.write(&npy_header(dtype, 0))?;
        }
        Ok(Self { path: path.into(), overwrite, file, dtype, npy, tokens: 0, hash: Xxh3::new() })
    }

    /// Appends packed ids.
    pub fn write(&mut self, packed: &[u8]) -> Result<()> {
        self.tokens += (packed.len() / self.dtype.size()) as u64;
        self.hash.update(packed);
        self.file.write(packed)
    }

    /// Ids written so far.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Completes the file and its manifest. The manifest takes its name first: a token file without one never exists.
    pub fn finish(mut self, describe: impl FnOnce(u64, String) -> Manifest) -> Result<Manifest> {
        if self.npy {
            let header = npy_header(self.dtype, self.tokens);
            self.file.write_head(&header)?;
        }
        // On the disk first: what is left to do after the manifest has its name is one rename.
        self.file.sync()?;
        let manifest = describe(self.tokens, checksum_text(&self.hash));
        let json = manifest.to_json()? + "\n";
        write_file(&manifest_path(&self.path), json.as_bytes(), self.overwrite || is_orphan(&self.path))?;
        let committed = self.file.commit();
        if committed.is_err() && !self.overwrite {
            // Without the ids it describes nothing. The error that matters is the one above.
            let _ = std::fs::remove_file(manifest_path(&self.path));
        }
        committed.map(|()| manifest)
    }
}

/// Header of a one-dimensional `.npy` (format version 1.0 of NumPy's NEP 1), padded to [`NPY_HEADER`].
fn npy_header(dtype: Dtype, tokens: u64) -> [u8; NPY_HEADER] {
    let text = format!("{{'descr': '<u{}', 'fortran_order': False, 'shape': ({tokens},), }}", dtype.size());
    let mut header = [b' '; NPY_HEADER];
    header[..6].copy_from_slice(b"\x93NUMPY");
    header[6..8].copy_from_slice(&[1, 0]);
    header[8..10].copy_from_slice(&(NPY_HEADER as u16 - 10).to_le_bytes());
    header[10..10 + text.len()].copy_from_slice(text.as_bytes());
    header[NPY_HEADER - 1] = b'\n';
    header
}
