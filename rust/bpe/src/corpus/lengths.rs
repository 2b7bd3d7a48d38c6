//! What stretches of ids stand for, told by the ids alone.
//!
//! In: ids. Out: bytes of text, greatest id, whether text is left open. Called by `outlet`, where a chunk is divided.

use std::ops::Range;

use crate::tokens::Dtype;
use crate::train::TokenId;
use crate::vocab::Vocab;

/// What stretches of ids stand for, by their ids: looked up only where a chunk is divided.
pub(super) struct Lengths {
    dtype: Dtype,
    /// Bytes of text; none of special tokens.
    text: Vec<u32>,
    /// Bytes that they take in a text file.
    whole: Vec<u32>,
    blank: Vec<bool>,
}

/// What is known of a stretch of ids, less where its documents end.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Known {
    pub text_bytes: u64,
    pub max_id: Option<TokenId>,
    /// Ends of documents.
    pub documents: u64,
    /// Text stands behind the last end, or in all of it where there is none.
    pub open: bool,
}

impl Lengths {
    pub fn new(vocab: &Vocab, dtype: Dtype) -> Self {
        let ids = 0..vocab.len() as TokenId;
        let token = |id| vocab.token(id).unwrap_or_default();
        Self {
            dtype,
            text: ids.clone().map(|id| if vocab.is_special(id) { 0 } else { token(id).len() as u32 }).collect(),
            whole: ids.clone().map(|id| token(id).len() as u32).collect(),
            blank: ids.map(|id| !vocab.is_special(id) && token(id).iter().all(u8::is_ascii_whitespace)).collect(),
        }
    }

    /// Measures a stretch; `ends` are those in it, counted as it is.
    pub fn measure(&self, ids: &[u8], stretch: &Range<usize>, ends: &[usize]) -> Known {
        let size = self.dtype.size();
        let of = |from: usize, to: usize| self.dtype.unpack(&ids[from * size..to * size]);
        let last = ends.last().copied().unwrap_or(stretch.start);
        Known {
            text_bytes: of(stretch.start, stretch.end).map(|id| u64::from(self.text[id as usize])).sum(),
            max_id: of(stretch.start, stretch.end).max(),
            documents: ends.len() as u64,
            open: of(last, stretch.end).any(|id| !self.blank[id as usize]),
        }
    }

    /// Bytes that ids take in their file; in records special tokens are none of it.
    pub fn bytes(&self, ids: &[u8], records: bool) -> u64 {
        let lengths = if records { &self.text } else { &self.whole };
        self.dtype.unpack(ids).map(|id| u64::from(lengths[id as usize])).sum()
    }
}
