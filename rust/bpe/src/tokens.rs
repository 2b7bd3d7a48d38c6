//! Token files: ids on disk, `.npy` or raw, with a JSON manifest beside them (`docs/formats.md`).
//!
//! In: ids in order. Out: a file that takes its name only when it is complete. Called by `corpus`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use twox_hash::xxhash3_128::Hasher as Xxh3;

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

    /// NumPy's name of the type.
    pub(crate) fn descr(self) -> &'static str {
        match self {
            Self::Uint16 => "<u2",
            Self::Uint32 => "<u4",
        }
    }

    /// The ids that some bytes hold.
    pub(crate) fn unpack(self, bytes: &[u8]) -> impl Iterator<Item = TokenId> + '_ {
        let narrow = self == Self::Uint16;
        let (two, four) = if narrow { (bytes, &[][..]) } else { (&[][..], bytes) };
        let two = two.as_chunks().0.iter().map(|&b| TokenId::from(u16::from_le_bytes(b)));
        two.chain(four.as_chunks().0.iter().map(|&b| u32::from_le_bytes(b)))
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
    /// Its size, or that of the part of it which was read.
    pub bytes: u64,
    /// The byte at which that part begins; none: the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// XXH3-128 of these bytes.
    pub checksum: String,
}

/// The file of documents' ends beside a token file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DocumentEnds {
    /// Its name.
    pub file: String,
    /// XXH3-128 of the whole file.
    pub checksum: String,
}

/// One of several files that hold the ids together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shard {
    /// Its name.
    pub file: String,
    /// Number of ids.
    pub tokens: u64,
    /// XXH3-128 of the ids' bytes.
    pub checksum: String,
}

/// Which shard a file is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardOf {
    /// From 0.
    pub number: u64,
    /// The name that was given for all of them.
    pub of: String,
}

/// Which documents a file holds, where they were divided.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SplitOf {
    /// The part that this is; none: the documents that no part took.
    pub part: Option<String>,
    /// The parts and their shares.
    pub shares: Vec<(String, f64)>,
    /// What chose the documents.
    pub seed: u64,
}

/// Which part of the inputs was read, where several processes share them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartOf {
    /// From 1.
    pub number: u64,
    /// How many there are.
    pub of: u64,
    /// Whether the last document goes on in the next part.
    pub open: bool,
    /// Ids of white space behind the last end of a document, which belong to the next one; known with the ends only.
    pub tail: u64,
    /// What else decides the ids, by name: parts that are to be joined have it alike.
    #[serde(default)]
    pub settings: BTreeMap<String, String>,
}

/// What stands beside a token file, as `<file>.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
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
    /// XXH3-128 of the ids' bytes (the `.npy` header left out); of shards, each has its own.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub checksum: String,
    /// The inputs, in order; of a shard none: the manifest of all shards has them.
    pub sources: Vec<Source>,
    /// Where documents end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub document_ends: Option<DocumentEnds>,
    /// The files of the ids, where there are several: `file` is the name that they are called after.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shards: Vec<Shard>,
    /// Which of them this is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shard: Option<ShardOf>,
    /// Which documents these are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split: Option<SplitOf>,
    /// Which part of the inputs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part: Option<PartOf>,
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
    Ok(checksum_text(&hash_of_file(path, offset, u64::MAX)?))
}

/// The state of XXH3 behind the bytes of a file from `offset` up to `end`, or up to its own.
pub(crate) fn hash_of_file(path: &Path, offset: u64, end: u64) -> Result<Xxh3> {
    let failed = |e: std::io::Error| Error::io(path, &e);
    let mut file = File::open(path).map_err(failed)?;
    file.seek(SeekFrom::Start(offset)).map_err(failed)?;
    let mut file = file.take(end.saturating_sub(offset));
    let (mut hash, mut buffer) = (Xxh3::new(), vec![0; 1 << 18]);
    loop {
        match file.read(&mut buffer).map_err(failed)? {
            0 => return Ok(hash),
            n => hash.write(&buffer[..n]),
        }
    }
}

/// An XXH3-128 digest in the manifest's spelling.
pub fn checksum_text(hash: &Xxh3) -> String {
    format!("xxh3-128:{:032x}", hash.finish_128())
}

/// Where the manifest of a token file lies.
pub fn manifest_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".json");
    name.into()
}

/// The manifest of `path`, where there is a whole one.
pub(crate) fn read_manifest(path: &Path) -> Option<Manifest> {
    serde_json::from_slice(&std::fs::read(manifest_path(path)).ok()?).ok()
}

/// Whether the manifest of `path` was left without its token file by a writer that was killed between two renames.
pub(crate) fn is_orphan(path: &Path) -> bool {
    let names = |m: &Manifest| path.file_name().is_some_and(|name| m.file == name.to_string_lossy());
    !path.exists() && read_manifest(path).is_some_and(|m| m.shards.is_empty() && names(&m))
}

/// Length of the `.npy` header that is written: fixed, so that the count can be filled in at the end.
pub(crate) const NPY_HEADER: usize = 128;

/// Header of a one-dimensional `.npy` (format version 1.0 of NumPy's NEP 1), padded to [`NPY_HEADER`]; `descr` is NumPy's
/// name of the type.
pub(crate) fn npy_header(descr: &str, count: u64) -> [u8; NPY_HEADER] {
    let text = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({count},), }}");
    let mut header = [b' '; NPY_HEADER];
    header[..6].copy_from_slice(b"\x93NUMPY");
    header[6..8].copy_from_slice(&[1, 0]);
    header[8..10].copy_from_slice(&(NPY_HEADER as u16 - 10).to_le_bytes());
    header[10..10 + text.len()].copy_from_slice(text.as_bytes());
    header[NPY_HEADER - 1] = b'\n';
    header
}
