//! A trained vocabulary: tokens, merges, special tokens and pattern, checked once and then immutable.
//!
//! In: what `train` learnt or `formats` read. Out: [`Vocab`]. Called by `encode` and `formats`.

use std::collections::HashSet;

use foldhash::fast::FixedState;
use hashbrown::HashTable;
use sha2::{Digest, Sha256};

use crate::alphabet::Alphabet;
use crate::error::{Error, Result};
use crate::listed::{Listed, hash, index};
use crate::pretokenize::canonical_name;
use crate::token_bytes::TokenBytes;
use crate::train::{Merges, Pair, TokenId};

/// A merge: what is joined, what comes out, and its priority (smallest first).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Merge {
    /// The two tokens.
    pub pair: Pair,
    /// The token that they become.
    pub id: TokenId,
    /// Priority; several merges may share one where a file gives ranks to tokens instead of merges.
    pub rank: u32,
}

/// A checked vocabulary.
#[derive(Debug, Clone)]
pub struct Vocab {
    /// Bytes of each token by id; empty where an id is a special token's or nobody's.
    tokens: TokenBytes,
    merges: Vec<Merge>,
    /// In the order of their ids.
    specials: Vec<(String, TokenId)>,
    byte_ids: [TokenId; 256],
    /// Ordinary tokens, found by a hash of their bytes.
    by_bytes: HashTable<TokenId>,
    pattern: String,
    ignore_merges: bool,
    /// Merges were shown to make every token, so that `ignore_merges` changes nothing.
    makes_all: bool,
}

impl Vocab {
    /// Checks and joins the parts.
    ///
    /// `tokens` are the ordinary tokens with their ids, `merges` in order of priority. `ignore_merges`: a
    /// pre-token that is a token is taken whole before any merge (as tiktoken does).
    ///
    /// # Errors
    /// [`Error::Config`] for a byte without a token, an id without a token below the last ordinary one or too many
    /// behind it, duplicates among ids or tokens, a duplicate or empty special token, a merge whose result is not a
    /// token.
    pub fn new(
        tokens: &[(Vec<u8>, TokenId)],
        merges: Vec<Merge>,
        specials: Vec<(String, TokenId)>,
        pattern: &str,
        ignore_merges: bool,
    ) -> Result<Self> {
        let (bytes, ids) =
            (tokens.iter().map(|token| &token.0).collect(), tokens.iter().map(|token| token.1).collect());
        Self::from_listed(Listed::new(bytes, ids)?, merges, specials, pattern, ignore_merges)
    }

    /// The same of tokens that are found by their bytes already.
    pub(crate) fn from_listed(
        listed: Listed,
        merges: Vec<Merge>,
        mut specials: Vec<(String, TokenId)>,
        pattern: &str,
        ignore_merges: bool,
    ) -> Result<Self> {
        specials.sort_unstable_by_key(|special| special.1);
        check_specials(specials.iter().map(|(text, _)| text.as_str()))?;
        let (tokens, by_bytes) = listed.by_id(&specials)?;
        Self::of((tokens, by_bytes), merges, specials, pattern, ignore_merges)
    }

    /// The same of tokens in the order of their ids, special ones empty.
    fn of(
        (tokens, by_bytes): (TokenBytes, HashTable<TokenId>),
        merges: Vec<Merge>,
        specials: Vec<(String, TokenId)>,
        pattern: &str,
        ignore_merges: bool,
    ) -> Result<Self> {
        let mut this = Self {
            tokens,
            merges,
            specials,
            byte_ids: [0; 256],
            by_bytes,
            pattern: canonical_name(pattern).into(),
            ignore_merges,
            makes_all: false,
        };
        let alphabet = Alphabet::new();
        for (text, id) in &this.specials {
            // Files write ordinary tokens in an alphabet of bytes: a special token of the same spelling would be them.
            if let Some(same) = alphabet.bytes(text).and_then(|bytes| this.id_of(&bytes)) {
                return Err(Error::Config(format!(
                    "special token {text:?} ({id}): token {same} has the same spelling in tokenizer files; expected a text of its own, such as <|endoftext|>"
                )));
            }
        }
        for byte in 0u8..=255 {
            this.byte_ids[usize::from(byte)] = this.id_of(&[byte]).ok_or_else(|| {
                Error::Config(format!("vocabulary: byte 0x{byte:02x} has no token; expected all 256 bytes"))
            })?;
        }
        this.merges.iter().try_for_each(|merge| this.check(merge))?;
        Ok(this)
    }

    /// A merge joins two ordinary tokens to a third.
    fn check(&self, merge: &Merge) -> Result<()> {
        let part = |id| self.tokens.get(id).filter(|bytes| !bytes.is_empty());
        let (a, b) = merge.pair;
        let (Some(left), Some(right)) = (part(a), part(b)) else {
            return Err(Error::Config(format!("merge {}: found ids {a} and {b}; expected two tokens", merge.rank)));
        };
        if part(merge.id).and_then(|joined| joined.strip_prefix(left)) != Some(right) {
            return Err(Error::Config(format!(
                "merge {}: {:?} is not token {}; expected the two parts' bytes joined",
                merge.rank,
                String::from_utf8_lossy(&[left, right].concat()),
                merge.id
            )));
        }
        Ok(())
    }

    /// The vocabulary of freshly trained merges; the special tokens get the ids after the last merge.
    pub fn from_training(merges: Merges, specials: &[String], pattern: &str) -> Result<Self> {
        check_specials(specials.iter().map(String::as_str))?;
        let mut tokens = merges.tokens;
        let rules = (0u32..).zip(&merges.pairs).map(|(rank, &pair)| Merge { pair, id: 256 + rank, rank }).collect();
        let specials: Vec<_> = specials.iter().cloned().zip(tokens.len() as TokenId..).collect();
        for _ in &specials {
            tokens.push(&[]);
        }
        let by_bytes = index(&tokens, |place| place)?;
        Self::of((tokens, by_bytes), rules, specials, pattern, false)
    }

    /// Number of ids, special tokens' and free ones included: ids are below this.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Never: 256 bytes are always there.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Bytes of a token; of a special token the bytes of its text; none for an id that nobody has.
    pub fn token(&self, id: TokenId) -> Option<&[u8]> {
        let bytes = self.tokens.get(id)?;
        if !bytes.is_empty() {
            return Some(bytes);
        }
        let at = self.specials.binary_search_by_key(&id, |special| special.1).ok()?;
        Some(self.specials[at].0.as_bytes())
    }

    /// Id of an ordinary token by its bytes.
    pub fn id_of(&self, bytes: &[u8]) -> Option<TokenId> {
        self.by_bytes.find(hash(bytes), |&id| &self.tokens[id] == bytes).copied()
    }

    /// Id of each single byte.
    pub fn byte_ids(&self) -> &[TokenId; 256] {
        &self.byte_ids
    }

    /// The merges, in order of priority.
    pub fn merges(&self) -> &[Merge] {
        &self.merges
    }

    /// Special tokens with their ids.
    pub fn specials(&self) -> &[(String, TokenId)] {
        &self.specials
    }

    /// Whether `id` is below [`len`](Self::len) and no ordinary token's: a special token's, or nobody's.
    pub fn is_special(&self, id: TokenId) -> bool {
        self.tokens.get(id).is_some_and(<[u8]>::is_empty)
    }

    /// The end-of-text token: `<|endoftext|>`, else the only special token there is.
    pub fn eot(&self) -> Option<TokenId> {
        match self.specials.iter().find(|special| special.0 == "<|endoftext|>") {
            Some(special) => Some(special.1),
            None if self.specials.len() == 1 => Some(self.specials[0].1),
            None => None,
        }
    }

    /// The pattern: a name or a regular expression.
    pub fn pattern(&self) -> &str {
        &self.pattern
    }

    /// Whether a pre-token that is a token is taken whole before any merge.
    pub fn ignore_merges(&self) -> bool {
        self.ignore_merges
    }

    /// Whether a token has to be looked for before any merge, as the merges might make something else of its bytes.
    pub(crate) fn looks_for_words(&self) -> bool {
        self.ignore_merges && !self.makes_all
    }

    /// Of merges that were found by merging every token's bytes.
    pub(crate) fn that_makes_all(self) -> Self {
        Self { makes_all: true, ..self }
    }

    /// SHA-256 over everything that decides ids, as `sha256:` and hexadecimal digits.
    pub fn hash(&self) -> String {
        let mut hasher = Sha256::new();
        let mut put = |bytes: &[u8]| {
            hasher.update((bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        put(b"bytekiln tokenizer 1");
        put(self.pattern.as_bytes());
        put(&[u8::from(self.ignore_merges)]);
        put(&(self.tokens.len() as u64).to_le_bytes());
        for token in self.tokens.iter() {
            put(token);
        }
        for merge in &self.merges {
            let (a, b) = merge.pair;
            put(&[a, b, merge.id, merge.rank].map(u32::to_le_bytes).concat());
        }
        for (text, id) in &self.specials {
            put(text.as_bytes());
            put(&id.to_le_bytes());
        }
        let digest = hasher.finalize();
        digest.iter().fold(String::from("sha256:"), |hex, byte| hex + &format!("{byte:02x}"))
    }
}

/// Refuses an empty or a repeated special token.
pub fn check_specials<'a>(specials: impl Iterator<Item = &'a str>) -> Result<()> {
    let mut seen: HashSet<&str, FixedState> = HashSet::default();
    let alphabet = Alphabet::new();
    for special in specials {
        if special.is_empty() {
            return Err(Error::Config("special token: found an empty one; expected at least one character".into()));
        }
        let mut chars = special.chars();
        if chars.next().is_some_and(|c| alphabet.byte(c).is_some()) && chars.next().is_none() {
            return Err(Error::Config(format!(
                "special token {special:?}: stands for a single byte in tokenizer files; expected a longer text, such as <|endoftext|>"
            )));
        }
        if !seen.insert(special) {
            return Err(Error::Config(format!("special token {special:?}: given twice; expected each once")));
        }
    }
    Ok(())
}

/// How many merges a vocabulary of `vocab_size` has room for.
pub fn room_for_merges(vocab_size: usize, specials: &[String]) -> Result<usize> {
    check_specials(specials.iter().map(String::as_str))?;
    let least = 256 + specials.len();
    if u32::try_from(vocab_size).is_err() {
        return Err(Error::Config(format!(
            "vocab_size: found {vocab_size}; expected at most {} (ids of 32 bits)",
            u32::MAX
        )));
    }
    vocab_size.checked_sub(least).ok_or_else(|| {
        Error::Config(format!(
            "vocab_size: found {vocab_size}; expected at least {least} (256 bytes + {} special tokens)",
            specials.len()
        ))
    })
}
