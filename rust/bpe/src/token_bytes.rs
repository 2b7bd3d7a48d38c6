//! The bytes of tokens by id, flat: two allocations instead of one a token.
//!
//! Made by `train` and `vocab`, read wherever a token's bytes are asked for.

use std::ops::Index;

use crate::train::TokenId;

/// Byte strings, numbered from 0.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenBytes {
    bytes: Vec<u8>,
    /// Where each one ends in `bytes`.
    ends: Vec<usize>,
}

impl TokenBytes {
    /// None, with room for so many and their bytes.
    pub fn with_capacity(tokens: usize, bytes: usize) -> Self {
        Self { bytes: Vec::with_capacity(bytes), ends: Vec::with_capacity(tokens) }
    }

    /// Byte strings that lie one behind the other in `bytes`, each with where it ends.
    pub(crate) fn from_parts(bytes: Vec<u8>, ends: Vec<usize>) -> Self {
        Self { bytes, ends }
    }

    /// Adds one, which gets the next number.
    pub fn push(&mut self, token: &[u8]) {
        self.bytes.extend_from_slice(token);
        self.ends.push(self.bytes.len());
    }

    /// Number of byte strings.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Keeps the first `len`.
    pub fn truncate(&mut self, len: usize) {
        self.ends.truncate(len);
        self.bytes.truncate(self.ends.last().copied().unwrap_or_default());
    }

    /// The one of a number.
    pub fn get(&self, id: TokenId) -> Option<&[u8]> {
        ((id as usize) < self.len()).then(|| &self[id])
    }

    /// The one of a number and the next one, joined.
    pub(crate) fn with_next(&self, id: TokenId) -> &[u8] {
        let id = id as usize;
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start..self.ends[id + 1]]
    }

    /// All of them, by number.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[u8]> {
        let mut start = 0;
        self.ends.iter().map(move |&end| {
            let token = &self.bytes[start..end];
            start = end;
            token
        })
    }
}

impl Index<TokenId> for TokenBytes {
    type Output = [u8];

    fn index(&self, id: TokenId) -> &[u8] {
        let id = id as usize;
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start..self.ends[id]]
    }
}

impl<T: AsRef<[u8]>> FromIterator<T> for TokenBytes {
    fn from_iter<I: IntoIterator<Item = T>>(tokens: I) -> Self {
        let mut all = Self::default();
        tokens.into_iter().for_each(|token| all.push(token.as_ref()));
        all
    }
}
