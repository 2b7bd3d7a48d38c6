//! A trained vocabulary: tokens, merges, special tokens and pattern, checked once and then immutable.
//!
//! In: what `train` learnt or `formats` read. Out: [`Vocab`]. Called by `encode` and `formats`.

use std::collections::HashSet;
use std::hash::BuildHasher;

use foldhash::fast::FixedState;
use hashbrown::HashTable;
use hashbrown::hash_table::Entry;
use sha2::{Digest, Sha256};

use crate::alphabet::Alphabet;
use crate::error::{Error, Result};
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

/// Tokens as a file lists them, in its own order, found by their bytes.
#[derive(Debug)]
pub(crate) struct Listed {
    tokens: TokenBytes,
    ids: Vec<TokenId>,
    /// Places in the list.
    by_bytes: HashTable<u32>,
    removed: HashSet<u32, FixedState>,
}

impl Listed {
    /// # Errors
    /// [`Error::Config`] for an empty token and for one that is there twice.
    pub fn new(tokens: TokenBytes, ids: Vec<TokenId>) -> Result<Self> {
        if let Some((_, id)) = tokens.iter().zip(&ids).find(|(bytes, _)| bytes.is_empty()) {
            return Err(Error::Config(format!("vocabulary: token {id} is empty; expected at least one byte")));
        }
        let by_bytes = index(&tokens, |place| ids[place as usize])?;
        Ok(Self { tokens, ids, by_bytes, removed: HashSet::default() })
    }

    /// The place of a token.
    #[inline]
    pub fn find(&self, bytes: &[u8]) -> Option<u32> {
        self.by_bytes.find(hash(bytes), |&place| &self.tokens[place] == bytes).copied()
    }

    /// Whether that token is found at that place.
    #[inline]
    pub fn is_at(&self, place: u32, bytes: &[u8]) -> bool {
        self.tokens.get(place) == Some(bytes) && !self.removed.contains(&place)
    }

    /// Tokens of the list, removed ones too.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    pub fn id(&self, place: u32) -> TokenId {
        self.ids[place as usize]
    }

    pub fn token(&self, place: u32) -> &[u8] {
        &self.tokens[place]
    }

    pub fn ids(&self) -> &[TokenId] {
        &self.ids
    }

    /// Takes a token out of those that are found: it is a special one.
    pub fn remove(&mut self, place: u32) {
        let found = self.by_bytes.find_entry(hash(&self.tokens[place]), |&other| other == place);
        if let Ok(entry) = found {
            entry.remove();
            self.removed.insert(place);
        }
    }

    /// What is found, in the order of ids, empty where an id is one of the `specials` (sorted by id) or free.
    fn by_id(mut self, specials: &[(String, TokenId)]) -> Result<(TokenBytes, HashTable<TokenId>)> {
        const FREE: u32 = u32::MAX;
        const SPECIAL: u32 = u32::MAX - 1;
        let here = self.by_bytes.iter().map(|&place| self.ids[place as usize]);
        let last = here.chain(specials.iter().map(|special| special.1)).max();
        let count = self.by_bytes.len() + specials.len();
        let size = last.map_or(0, |last| last as usize + 1);
        if size > 2 * count {
            return Err(Error::Config(format!(
                "vocabulary: found id {} among {count} tokens; expected the ids 0 to {}, or few more behind the last ordinary token",
                size - 1,
                count.saturating_sub(1)
            )));
        }
        let mut places = vec![FREE; size];
        let twice = |id| Error::Config(format!("vocabulary: id {id} is given twice; expected one token an id"));
        for &(_, id) in specials {
            if std::mem::replace(&mut places[id as usize], SPECIAL) != FREE {
                return Err(twice(id));
            }
        }
        for place in &mut self.by_bytes {
            let id = self.ids[*place as usize];
            if std::mem::replace(&mut places[id as usize], *place) != FREE {
                return Err(twice(id));
            }
            *place = id;
        }
        // Behind the last ordinary token ids may be free: cl100k_base and o200k_base leave some between special ones.
        let ordinary = places.iter().rposition(|&place| place < SPECIAL).map_or(0, |last| last + 1);
        if let Some(hole) = places[..ordinary].iter().position(|&place| place == FREE) {
            return Err(Error::Config(format!(
                "vocabulary: no token has id {hole}; expected the ids 0 to {} without a hole",
                ordinary - 1
            )));
        }
        let token = |&place: &u32| if place < SPECIAL { &self.tokens[place] } else { &[][..] };
        Ok((places.iter().map(token).collect(), self.by_bytes))
    }
}

/// Places of tokens by their bytes; empty ones have none.
fn index(tokens: &TokenBytes, id_of: impl Fn(u32) -> TokenId) -> Result<HashTable<u32>> {
    let mut by_bytes = HashTable::with_capacity(tokens.len());
    for (place, bytes) in (0..).zip(tokens.iter()).filter(|(_, bytes)| !bytes.is_empty()) {
        let (same, rehash) = (|&other: &u32| &tokens[other] == bytes, |&place: &u32| hash(&tokens[place]));
        match by_bytes.entry(hash(bytes), same, rehash) {
            Entry::Vacant(free) => {
                free.insert(place);
            }
            Entry::Occupied(first) => {
                return Err(Error::Config(format!(
                    "vocabulary: tokens {} and {} are the same bytes ({:?}); expected distinct tokens",
                    id_of(*first.get()),
                    id_of(place),
                    String::from_utf8_lossy(bytes)
                )));
            }
        }
    }
    Ok(by_bytes)
}

fn hash(bytes: &[u8]) -> u64 {
    FixedState::default().hash_one(bytes)
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
