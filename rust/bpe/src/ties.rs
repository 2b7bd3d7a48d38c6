//! Which pair merges first among equally frequent ones, and the bytes of the tokens that this depends on.

use std::cmp::Ordering;

use crate::error::{Error, Result};
use crate::token_bytes::TokenBytes;
use crate::train::{Pair, TokenId, byte_alphabet};

/// Which pair merges first among the most frequent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TieBreak {
    /// The greatest pair of byte strings.
    #[default]
    Lexicographic,
    /// The smallest pair of ids, single bytes numbered as in Hugging Face's alphabet.
    HuggingFace,
    /// The smallest pair of ids: bytes by their value, then tokens in the order in which they were made.
    RawBytes,
}

impl TieBreak {
    /// The rule of a name: `lexicographic`, `huggingface` or `raw-bytes`.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "lexicographic" => Ok(Self::Lexicographic),
            "huggingface" => Ok(Self::HuggingFace),
            "raw-bytes" => Ok(Self::RawBytes),
            _ => Err(Error::Config(format!(
                "tie_break: found {name:?}; expected lexicographic, huggingface or raw-bytes"
            ))),
        }
    }
}

/// The tokens made so far, flat, and the rule that orders pairs of them.
pub(crate) struct Ties {
    rule: TieBreak,
    alphabet_rank: [u32; 256],
    bytes: Vec<u8>,
    tokens: Vec<Token>,
}

#[derive(Clone, Copy)]
struct Token {
    /// The first eight bytes, the first one highest, zeros behind the end: decides most comparisons.
    prefix: u64,
    start: usize,
    len: u32,
}

impl Ties {
    /// The 256 bytes.
    pub(crate) fn new(rule: TieBreak) -> Self {
        let alphabet = byte_alphabet();
        let mut alphabet_rank = [0; 256];
        for (byte, rank) in alphabet_rank.iter_mut().enumerate() {
            *rank = alphabet.iter().filter(|&&c| c < alphabet[byte]).count() as u32;
        }
        let mut ties = Self { rule, alphabet_rank, bytes: Vec::new(), tokens: Vec::new() };
        for byte in 0..=255 {
            ties.bytes.push(byte);
            ties.push(1);
        }
        ties
    }

    /// The last `len` bytes are a token.
    fn push(&mut self, len: usize) {
        let start = self.bytes.len() - len;
        let mut prefix = [0; 8];
        let known = len.min(8);
        prefix[..known].copy_from_slice(&self.bytes[start..start + known]);
        self.tokens.push(Token { prefix: u64::from_be_bytes(prefix), start, len: len as u32 });
    }

    /// Makes the token of a pair and returns its id.
    pub(crate) fn join(&mut self, (a, b): Pair) -> TokenId {
        for id in [a, b] {
            let Token { start, len, .. } = self.tokens[id as usize];
            self.bytes.extend_from_within(start..start + len as usize);
        }
        self.push(self.len_of(a) + self.len_of(b));
        self.tokens.len() as TokenId - 1
    }

    /// Bytes of a token.
    pub(crate) fn len_of(&self, id: TokenId) -> usize {
        self.tokens[id as usize].len as usize
    }

    /// The bytes of a token.
    pub(crate) fn bytes_of(&self, id: TokenId) -> &[u8] {
        let Token { start, len, .. } = self.tokens[id as usize];
        &self.bytes[start..start + len as usize]
    }

    /// The bytes of every token: they lie one behind the other.
    pub(crate) fn into_tokens(self) -> TokenBytes {
        let ends = self.tokens.iter().map(|token| token.start + token.len as usize).collect();
        TokenBytes::from_parts(self.bytes, ends)
    }

    fn number(&self, id: TokenId) -> u32 {
        self.alphabet_rank.get(id as usize).copied().unwrap_or(id)
    }

    fn cmp_bytes(&self, a: TokenId, b: TokenId) -> Ordering {
        let prefixes = self.tokens[a as usize].prefix.cmp(&self.tokens[b as usize].prefix);
        prefixes.then_with(|| if a == b { Ordering::Equal } else { self.bytes_of(a).cmp(self.bytes_of(b)) })
    }

    /// Orders pairs of equal count; `Greater` merges first.
    pub(crate) fn cmp(&self, a: Pair, b: Pair) -> Ordering {
        match self.rule {
            TieBreak::Lexicographic => self.cmp_bytes(a.0, b.0).then_with(|| self.cmp_bytes(a.1, b.1)),
            TieBreak::HuggingFace => {
                let numbers = |p: Pair| (self.number(p.0), self.number(p.1));
                numbers(b).cmp(&numbers(a))
            }
            TieBreak::RawBytes => b.cmp(&a),
        }
    }
}
