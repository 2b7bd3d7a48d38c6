//! Tokens as a file lists them: checked, found by their bytes, then put in the order of their ids.
//!
//! In: tokens with ids, in any order. Out: tokens by id and a table of them. Called by `vocab` and `formats`.

use std::collections::HashSet;
use std::hash::BuildHasher;

use foldhash::fast::FixedState;
use hashbrown::HashTable;
use hashbrown::hash_table::Entry;

use crate::error::{Error, Result};
use crate::token_bytes::TokenBytes;
use crate::train::TokenId;

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
    pub fn by_id(mut self, specials: &[(String, TokenId)]) -> Result<(TokenBytes, HashTable<TokenId>)> {
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
pub(crate) fn index(tokens: &TokenBytes, id_of: impl Fn(u32) -> TokenId) -> Result<HashTable<u32>> {
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

/// The hash by which tokens are found.
pub(crate) fn hash(bytes: &[u8]) -> u64 {
    FixedState::default().hash_one(bytes)
}
