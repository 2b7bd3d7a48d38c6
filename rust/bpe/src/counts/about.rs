//! What was counted, and how: the head of a counts file.
//!
//! Two counts add up only if the same text would have given the same words: same pattern, special tokens and policy,
//! same version of Unicode. Called by everything else in `counts`.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::input::Position;
use crate::pretokenize::{Pattern, Splitter, TextPolicy, UNICODE_VERSION};

/// First bytes of a counts file.
pub(super) const MAGIC: &[u8; 16] = b"bytekiln counts\n";
/// Version of the format that is written; a reader takes none that is newer.
pub(super) const VERSION: u32 = 1;
/// Longest head that is read: a list of special tokens, nothing else is of any size.
pub(super) const LONGEST_HEAD: usize = 16 << 20;
/// Size of a block's head: sizes unpacked and packed, words, checksum of the packed bytes, checksum of all that.
pub(super) const BLOCK_HEAD: usize = 28;
/// Size of what ends a counts file: four totals, a checksum, [`END`].
pub(super) const TRAILER: usize = 48;
/// Last bytes of a counts file.
pub(super) const END: &[u8; 8] = b"\ncounts.";
/// Bytes at which a block is full. A word that is longer has a block of its own.
pub(super) const BLOCK: usize = 64 << 10;

/// The sum of what a counts file holds; its last bytes, as a stream knows them only then.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Totals {
    pub(super) words: u64,
    pub(super) pretokens: u64,
    /// Bytes of the distinct words together.
    pub(super) word_bytes: u64,
    pub(super) blocks: u64,
}

/// How words were cut out of text, and how much text it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct About {
    /// `gpt2`, `cl100k`, `o200k` or the regular expression.
    pub pattern: String,
    /// SHA-256 of the regular expression, in hexadecimal.
    pub pattern_hash: String,
    /// Special tokens, in the order of their ids.
    pub special_tokens: Vec<String>,
    /// SHA-256 of the special tokens, each behind its length (u64, little-endian).
    pub special_tokens_hash: String,
    /// What was done with invalid UTF-8: `error`, `replace` or `bytes`.
    pub errors: String,
    /// Version of the Unicode tables behind the pattern.
    pub unicode: String,
    /// Bytes of text.
    pub bytes: u64,
    /// Words counted, repeats included.
    pub pretokens: u64,
    /// Texts counted, each a file or a document.
    pub documents: u64,
    /// Where counting goes on: these are the counts of a part, as a checkpoint keeps them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<Position>,
}

impl About {
    /// Nothing counted yet.
    pub fn new(splitter: &Splitter, policy: TextPolicy) -> Self {
        Self {
            pattern: splitter.pattern().name().into(),
            pattern_hash: hash_of([splitter.pattern().source().as_bytes()], false),
            special_tokens: splitter.specials().to_vec(),
            special_tokens_hash: hash_of(splitter.specials().iter().map(String::as_bytes), true),
            errors: policy.name().into(),
            unicode: UNICODE_VERSION.into(),
            bytes: 0,
            pretokens: 0,
            documents: 0,
            next: None,
        }
    }

    /// What text must be cut with to add to these counts.
    ///
    /// # Errors
    /// A pattern that this version does not know, or knows as another one; special tokens that are not those hashed.
    pub(super) fn splitter(&self, place: &str) -> Result<(Splitter, TextPolicy)> {
        let made = Pattern::new(&self.pattern).and_then(|p| Splitter::new(p.into(), &self.special_tokens));
        let splitter = made.map_err(|e| Error::format(place, e.to_string()))?;
        let policy = TextPolicy::from_name(&self.errors).map_err(|e| Error::format(place, e.to_string()))?;
        let own = Self::new(&splitter, policy);
        for (what, found, expected) in [
            ("pattern's hash", &self.pattern_hash, &own.pattern_hash),
            ("special tokens' hash", &self.special_tokens_hash, &own.special_tokens_hash),
        ] {
            if found != expected {
                return Err(Error::format(place, format!("{what}: found {found}; expected {expected}")));
            }
        }
        Ok((splitter, policy))
    }

    /// Adds the totals of `other`, counted in the same way; `names` are those of both in messages.
    pub(super) fn add(&mut self, other: &Self, names: (&str, &str)) -> Result<()> {
        let specials = |about: &Self| format!("{:?}", about.special_tokens);
        for (what, a, b) in [
            ("pattern", &self.pattern, &other.pattern),
            ("special tokens", &specials(self), &specials(other)),
            ("errors", &self.errors, &other.errors),
            ("Unicode version", &self.unicode, &other.unicode),
            ("pattern's hash", &self.pattern_hash, &other.pattern_hash),
        ] {
            if a != b {
                return Err(Error::Config(format!("{}: found {what} {b}; expected {a} as in {}", names.1, names.0)));
            }
        }
        self.bytes = self.bytes.saturating_add(other.bytes);
        self.documents = self.documents.saturating_add(other.documents);
        self.pretokens = add(self.pretokens, other.pretokens)?;
        self.next = self.next.or(other.next);
        Ok(())
    }
}

/// A sum of counts.
///
/// # Errors
/// It reaches 2⁶⁴.
pub(super) fn add(a: u64, b: u64) -> Result<u64> {
    a.checked_add(b)
        .ok_or_else(|| Error::Config(format!("counts: found {a} + {b} words; expected fewer than 2^64 in all")))
}

fn hash_of<'a>(parts: impl IntoIterator<Item = &'a [u8]>, lengths: bool) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        if lengths {
            hash.update((part.len() as u64).to_le_bytes());
        }
        hash.update(part);
    }
    hash.finalize().iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
