//! Special tokens that a text must not contain, as tiktoken's `disallowed_special`.
//!
//! In: text, at once or in parts. Out: an error with the first place. Called by the binding.

use crate::encode::Allowed;
use crate::error::{Error, Result};
use crate::vocab::Vocab;

/// Looks for disallowed special tokens.
#[derive(Debug, Clone)]
pub struct Disallowed {
    names: Vec<String>,
    longest: usize,
    /// The end of the text so far, where one of them may have begun.
    tail: String,
    /// Where `tail` begins in the text.
    offset: usize,
}

impl Disallowed {
    /// `All` are the vocabulary's special tokens but those that are allowed. Those named are disallowed whatever is
    /// allowed, and need not be the vocabulary's: both as in tiktoken.
    ///
    /// # Errors
    /// [`Error::Config`] for an empty name, which would be everywhere.
    pub fn new(vocab: &Vocab, disallowed: Allowed<'_>, allowed: Allowed<'_>) -> Result<Self> {
        let allows = |name: &String| match allowed {
            Allowed::None => false,
            Allowed::All => true,
            Allowed::Only(names) => names.contains(name),
        };
        let names: Vec<String> = match disallowed {
            Allowed::None => Vec::new(),
            Allowed::All => {
                vocab.specials().iter().map(|(name, _)| name).filter(|name| !allows(name)).cloned().collect()
            }
            Allowed::Only(names) => names.to_vec(),
        };
        if names.iter().any(String::is_empty) {
            return Err(Error::Config("disallowed_special: found an empty text; expected special tokens".into()));
        }
        let longest = names.iter().map(String::len).max().unwrap_or(0);
        Ok(Self { names, longest, tail: String::new(), offset: 0 })
    }

    /// Whether nothing is disallowed.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Fails where `text`, a whole one, holds any of them; names the first, of those at one place the longest.
    pub fn refuse(&self, text: &[u8]) -> Result<()> {
        self.first(text).map_or(Ok(()), |(at, name)| Err(Self::error(at, name)))
    }

    /// The same with a text that arrives in parts.
    pub fn push(&mut self, part: &str) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        self.tail.push_str(part);
        if let Some((at, name)) = self.first(self.tail.as_bytes()) {
            return Err(Self::error(self.offset + at, name));
        }
        let mut keep = self.tail.len().saturating_sub(self.longest - 1);
        while !self.tail.is_char_boundary(keep) {
            keep -= 1;
        }
        self.offset += keep;
        self.tail.drain(..keep);
        Ok(())
    }

    fn first(&self, text: &[u8]) -> Option<(usize, &str)> {
        let found = self.names.iter().filter_map(|name| Some((memchr::memmem::find(text, name.as_bytes())?, name)));
        found.min_by_key(|&(at, name)| (at, usize::MAX - name.len())).map(|(at, name)| (at, name.as_str()))
    }

    fn error(at: usize, name: &str) -> Error {
        Error::Text(format!(
            "byte offset {at}: special token {name:?} in the text; expected none, \
             or allow it (allowed_special) or take it as text (disallowed_special=())"
        ))
    }
}
