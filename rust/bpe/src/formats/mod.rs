//! Tokenizer files, read and written: Hugging Face's `tokenizer.json` (native), `vocab.json` + `merges.txt`
//! as GPT-2 has them, and `.tiktoken` ranks (`docs/formats.md`).
//!
//! In: bytes of a file. Out: a checked [`Vocab`], and back. The kind of a file is told by its content, never
//! by its name. What Hugging Face's format can say and this core cannot do is refused by name.
//!
//! Rooms: `listing` < `parts` < `json`, `pair`, `ranks`; `ranks` < `write`.

mod json;
mod listing;
mod pair;
mod parts;
mod ranks;
mod write;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::pages;
use crate::train::TokenId;
use crate::vocab::Vocab;

pub use json::from_json;
pub use pair::{from_parts, read_vocab_and_merges};
pub use ranks::from_ranks;
pub use write::{to_json, write};

/// Bytes of a tokenizer file, at most: the largest published ones have some 35 MB, and what is read is held in memory.
const MOST_BYTES: usize = 1 << 29;

/// The formats that can be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Hugging Face's `tokenizer.json`.
    TokenizerJson,
    /// A folder with GPT-2's `vocab.json` and `merges.txt`.
    VocabMerges,
    /// tiktoken's ranks: a line a token, base64 and rank; neither pattern nor special tokens.
    Tiktoken,
    /// A folder with `tokenizer.json` and the `tokenizer_config.json` that Hugging Face's `AutoTokenizer` reads.
    Pretrained,
}

impl Format {
    /// The format of a name: `tokenizer.json`, `vocab+merges`, `tiktoken` or `pretrained`.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "tokenizer.json" => Ok(Self::TokenizerJson),
            "vocab+merges" => Ok(Self::VocabMerges),
            "tiktoken" => Ok(Self::Tiktoken),
            "pretrained" => Ok(Self::Pretrained),
            _ => Err(Error::Config(format!(
                "format: found {name:?}; expected tokenizer.json, vocab+merges, tiktoken or pretrained"
            ))),
        }
    }
}

/// Special tokens as a caller names them; those without an id get the next free ones.
pub type SpecialNames = Vec<(String, Option<TokenId>)>;

/// Reads a tokenizer of any format; a folder holds `tokenizer.json` or `vocab.json` + `merges.txt`.
///
/// `specials` adds special tokens (needed by `.tiktoken`, which has none), `pattern` overrides the file's
/// (needed by `.tiktoken`, which has none; `vocab.json` + `merges.txt` mean GPT-2's).
pub fn read(path: &Path, specials: Option<&SpecialNames>, pattern: Option<&str>) -> Result<Vocab> {
    let path = if path.is_dir() { find_in_folder(path)? } else { path.to_path_buf() };
    let bytes = read_bytes(&path)?;
    let place = path.display().to_string();
    if bytes.is_empty() {
        return Err(Error::File { path, what: "empty file (0 bytes); expected a tokenizer".into() });
    }
    if bytes.iter().find(|b| !b.is_ascii_whitespace()) != Some(&b'{') {
        let pattern = pattern.ok_or_else(|| {
            Error::Config(format!("{place}: a file of tiktoken ranks does not name its pattern; expected pattern= (gpt2, cl100k, o200k or a regular expression)"))
        })?;
        return ranks::from_tiktoken(&bytes, &place, specials, pattern);
    }
    // A plain vocabulary may well hold a token "model"; its value is an id.
    if let Some(vocab) = json::from_tokenizer_json(&bytes, &place, specials, pattern)? {
        return Ok(vocab);
    }
    let merges = path.with_file_name("merges.txt");
    if !merges.is_file() {
        let what = format!("a vocabulary without merges; expected {} beside it, or a tokenizer.json", merges.display());
        return Err(Error::format(place, what));
    }
    pair::from_vocab_and_merges((&bytes, &place), &merges, specials, pattern.unwrap_or("gpt2"))
}

fn find_in_folder(folder: &Path) -> Result<PathBuf> {
    let names = ["tokenizer.json", "vocab.json"];
    let found = names.iter().map(|name| folder.join(name)).find(|path| path.is_file());
    found.ok_or_else(|| Error::File {
        path: folder.into(),
        what: "holds no tokenizer; expected tokenizer.json, or vocab.json and merges.txt, in it".into(),
    })
}

/// A file's bytes, but not those of a file that cannot be a tokenizer's.
fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    let failed = |e: std::io::Error| Error::io(path, &e);
    let file = File::open(path).map_err(failed)?;
    let size = file.metadata().map_err(failed)?.len() as usize;
    if size <= MOST_BYTES {
        let mut bytes = Vec::with_capacity(size + 1);
        pages::large(&bytes);
        file.take(MOST_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
        if bytes.len() <= MOST_BYTES {
            return Ok(bytes);
        }
    }
    Err(too_large(&path.display().to_string(), size))
}

fn too_large(place: &str, size: usize) -> Error {
    Error::format(place, format!("found {size} bytes; expected a tokenizer of at most {MOST_BYTES}"))
}

fn text_of<'b>(bytes: &'b [u8], place: &str) -> Result<&'b str> {
    simdutf8::compat::from_utf8(bytes).map_err(|e| {
        let place = format!("{place}: byte offset {}", e.valid_up_to());
        Error::format(place, "invalid UTF-8; expected a tokenizer's text")
    })
}

fn at_place(place: &str, error: Error) -> Error {
    match error {
        Error::Config(what) => Error::format(place, what),
        other => other,
    }
}
