//! A trained vocabulary: tokens, merges, special tokens and pattern, checked once and then immutable.
//!
//! In: what `train` learnt or `formats` read. Out: [`Vocab`]. Called by `encode` and `formats`.

use std::collections::{HashMap, HashSet};

use foldhash::fast::FixedState;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::pretokenize::canonical_name;
use crate::train::{Merges, Pair, TokenId, byte_alphabet};

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
    /// Bytes of each token by id; empty where an id is a special token's.
    tokens: Vec<Vec<u8>>,
    merges: Vec<Merge>,
    /// In the order of their ids.
    specials: Vec<(String, TokenId)>,
    byte_ids: [TokenId; 256],
    by_bytes: HashMap<Vec<u8>, TokenId, FixedState>,
    pattern: String,
    ignore_merges: bool,
}

impl Vocab {
    /// Checks and joins the parts.
    ///
    /// `tokens` are the ordinary tokens with their ids, `merges` in order of priority. `ignore_merges`: a
    /// pre-token that is a token is taken whole before any merge (as tiktoken does).
    ///
    /// # Errors
    /// [`Error::Config`] for a byte without a token, holes or duplicates among the ids, a duplicate or empty
    /// special token, a merge whose result is not a token.
    pub fn new(
        tokens: Vec<(Vec<u8>, TokenId)>,
        merges: Vec<Merge>,
        mut specials: Vec<(String, TokenId)>,
        pattern: &str,
        ignore_merges: bool,
    ) -> Result<Self> {
        specials.sort_unstable_by_key(|special| special.1);
        check_specials(specials.iter().map(|(text, _)| text.as_str()))?;
        let size = tokens.len() + specials.len();
        let mut table: Vec<Option<Vec<u8>>> = vec![None; size];
        let mut by_bytes: HashMap<Vec<u8>, TokenId, FixedState> = HashMap::default();
        let mut place = |id: TokenId, bytes: Vec<u8>| match table.get_mut(id as usize) {
            None => Err(Error::Config(format!(
                "vocabulary: found id {id} among {size} tokens; expected the ids 0 to {} without a hole",
                size - 1
            ))),
            Some(Some(_)) => {
                Err(Error::Config(format!("vocabulary: id {id} is given twice; expected one token an id")))
            }
            Some(free) => {
                *free = Some(bytes);
                Ok(())
            }
        };
        for (bytes, id) in tokens {
            if bytes.is_empty() {
                return Err(Error::Config(format!("vocabulary: token {id} is empty; expected at least one byte")));
            }
            place(id, bytes.clone())?;
            if let Some(first) = by_bytes.insert(bytes, id) {
                return Err(Error::Config(format!(
                    "vocabulary: tokens {first} and {id} are the same bytes; expected distinct tokens"
                )));
            }
        }
        for (_, id) in &specials {
            place(*id, Vec::new())?;
        }
        let tokens: Vec<Vec<u8>> = table.into_iter().flatten().collect();
        let alphabet: HashMap<char, u8, FixedState> = byte_alphabet().into_iter().zip(0..=255).collect();
        for (text, id) in &specials {
            // Files write ordinary tokens in an alphabet of bytes: a special token of the same spelling would be them.
            let spelt: Option<Vec<u8>> = text.chars().map(|c| alphabet.get(&c).copied()).collect();
            if let Some(same) = spelt.and_then(|bytes| by_bytes.get(&bytes)) {
                return Err(Error::Config(format!(
                    "special token {text:?} ({id}): token {same} has the same spelling in tokenizer files; expected a text of its own, such as <|endoftext|>"
                )));
            }
        }
        let mut byte_ids = [0; 256];
        for (byte, id) in (0u8..=255).zip(&mut byte_ids) {
            *id = *by_bytes.get([byte].as_slice()).ok_or_else(|| {
                Error::Config(format!("vocabulary: byte 0x{byte:02x} has no token; expected all 256 bytes"))
            })?;
        }
        for merge in &merges {
            let (a, b) = merge.pair;
            let joined = match (tokens.get(a as usize), tokens.get(b as usize)) {
                (Some(a), Some(b)) if !a.is_empty() && !b.is_empty() => [a.as_slice(), b].concat(),
                _ => {
                    return Err(Error::Config(format!(
                        "merge {}: found ids {a} and {b}; expected two tokens",
                        merge.rank
                    )));
                }
            };
            if by_bytes.get(&joined) != Some(&merge.id) {
                return Err(Error::Config(format!(
                    "merge {}: {:?} is not token {}; expected the two parts' bytes joined",
                    merge.rank,
                    String::from_utf8_lossy(&joined),
                    merge.id
                )));
            }
        }
        Ok(Self {
            tokens,
            merges,
            specials,
            byte_ids,
            by_bytes,
            pattern: canonical_name(pattern).into(),
            ignore_merges,
        })
    }

    /// The vocabulary of freshly trained merges; the special tokens get the ids after the last merge.
    pub fn from_training(merges: Merges, specials: &[String], pattern: &str) -> Result<Self> {
        let next = merges.tokens.len() as TokenId;
        let specials = specials.iter().cloned().zip(next..).collect();
        let rules = (0u32..).zip(&merges.pairs).map(|(rank, &pair)| Merge { pair, id: 256 + rank, rank }).collect();
        let tokens = merges.tokens.into_iter().zip(0..).collect();
        Self::new(tokens, rules, specials, pattern, false)
    }

    /// Number of tokens, special ones included; ids are 0 up to this.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Never: 256 bytes are always there.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Bytes of a token; of a special token the bytes of its text.
    pub fn token(&self, id: TokenId) -> Option<&[u8]> {
        let bytes = self.tokens.get(id as usize)?;
        if !bytes.is_empty() {
            return Some(bytes);
        }
        let at = self.specials.binary_search_by_key(&id, |special| special.1).ok()?;
        Some(self.specials[at].0.as_bytes())
    }

    /// Id of an ordinary token by its bytes.
    pub fn id_of(&self, bytes: &[u8]) -> Option<TokenId> {
        self.by_bytes.get(bytes).copied()
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

    /// Whether `id` is a special token.
    pub fn is_special(&self, id: TokenId) -> bool {
        self.tokens.get(id as usize).is_some_and(Vec::is_empty)
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
        for token in &self.tokens {
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
    let alphabet = byte_alphabet();
    for special in specials {
        if special.is_empty() {
            return Err(Error::Config("special token: found an empty one; expected at least one character".into()));
        }
        let mut chars = special.chars();
        if chars.next().is_some_and(|c| alphabet.contains(&c)) && chars.next().is_none() {
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
