//! Tokens and merges as JSON lists them, read into flat arrays: no string of its own for a token, no tree of values.
//!
//! In: the parser's events. Out: [`Tokens`] and [`Halves`]. What is not in the byte alphabet is kept for the caller, who
//! first asks whether the model is of the right type at all. Called by `json` and `pair`.

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use crate::alphabet::Alphabet;
use crate::error::Error;
use crate::token_bytes::TokenBytes;
use crate::train::TokenId;

/// An object of tokens and ids.
#[derive(Debug, Default)]
pub struct Tokens {
    /// Bytes of those in the byte alphabet, in the order of the file.
    pub bytes: TokenBytes,
    /// Their ids.
    pub ids: Vec<TokenId>,
    /// The others: special tokens, or a mistake.
    pub raw: Vec<(String, TokenId)>,
}

/// A list of merges.
#[derive(Debug, Default)]
pub struct Halves {
    /// Left and right half of each, one behind the other.
    pub bytes: TokenBytes,
    /// The first one that is not two tokens of the byte alphabet: its place and what stands there.
    pub odd: Option<(usize, String)>,
}

impl Halves {
    /// Takes a half whose bytes are spelt already, or the text of one that cannot be.
    fn push(&mut self, odd: Option<String>, bytes: &[u8]) {
        if let Some(text) = odd.or_else(|| bytes.is_empty().then(String::new)) {
            self.odd.get_or_insert_with(|| (self.bytes.len() / 2, format!("the token {text:?}")));
        }
        self.bytes.push(bytes);
    }

    /// Takes a merge that is written as one text.
    pub fn push_text(&mut self, text: &str, speller: &mut Speller<'_>) {
        if let Some((left, right)) = text.split_once(' ') {
            for half in [left, right] {
                let odd = speller.spell(half);
                self.push(odd, &speller.bytes);
            }
        } else {
            self.odd.get_or_insert_with(|| (self.bytes.len() / 2, format!("{text:?}")));
        }
    }
}

/// The byte alphabet, and room for a token.
pub struct Speller<'a> {
    alphabet: &'a Alphabet,
    bytes: Vec<u8>,
}

impl<'a> Speller<'a> {
    pub fn new(alphabet: &'a Alphabet) -> Self {
        Self { alphabet, bytes: Vec::new() }
    }

    /// Makes `bytes` those of `text`, which comes back itself where it is not in the byte alphabet.
    fn spell(&mut self, text: &str) -> Option<String> {
        self.bytes.clear();
        (!self.alphabet.spell(text, &mut self.bytes)).then(|| text.to_string())
    }
}

/// Reads `T`; leaves it absent where another type of model has something else in its place.
pub struct Seed<'a, 's, T> {
    pub speller: &'a mut Speller<'s>,
    pub into: &'a mut Option<T>,
}

impl<'de> DeserializeSeed<'de> for Seed<'_, '_, Tokens> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Seed<'_, '_, Tokens> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object of tokens and ids")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<(), A::Error> {
        let tokens = self.into.get_or_insert_default();
        while let Some(raw) = entries.next_key_seed(Key(self.speller))? {
            let id = entries.next_value::<Value>()?;
            let id = id.as_u64().and_then(|id| TokenId::try_from(id).ok()).ok_or_else(|| {
                let text = raw.clone().unwrap_or_else(|| self.speller.alphabet.text(&self.speller.bytes));
                A::Error::custom(format!("token {text:?} has no id; expected a number below 2^32"))
            })?;
            if let Some(text) = raw {
                tokens.raw.push((text, id));
            } else {
                tokens.bytes.push(&self.speller.bytes);
                tokens.ids.push(id);
            }
        }
        Ok(())
    }

    /// Unigram has a list of tokens and scores. Passed over as values: so the parser's bound on depth holds here, too.
    fn visit_seq<A: SeqAccess<'de>>(self, mut entries: A) -> Result<(), A::Error> {
        while entries.next_element::<Value>()?.is_some() {}
        Ok(())
    }
}

/// A token's text, spelt into the speller's bytes; it comes back itself where it is not in the byte alphabet.
struct Key<'a, 's>(&'a mut Speller<'s>);

impl<'de> DeserializeSeed<'de> for Key<'_, '_> {
    type Value = Option<String>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Key<'_, '_> {
    type Value = Option<String>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a token")
    }

    fn visit_str<E>(self, text: &str) -> Result<Option<String>, E> {
        Ok(self.0.spell(text))
    }
}

impl<'de> DeserializeSeed<'de> for Seed<'_, '_, Halves> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Seed<'_, '_, Halves> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a list of merges")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut merges: A) -> Result<(), A::Error> {
        let halves = self.into.get_or_insert_default();
        while merges.next_element_seed(Merge { speller: self.speller, into: halves })?.is_some() {}
        Ok(())
    }
}

/// A merge: a text with a space, or two texts.
struct Merge<'a, 's> {
    speller: &'a mut Speller<'s>,
    into: &'a mut Halves,
}

impl<'de> DeserializeSeed<'de> for Merge<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Merge<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a merge: two tokens, or both in a text with a space between them")
    }

    fn visit_str<E>(self, text: &str) -> Result<(), E> {
        self.into.push_text(text, self.speller);
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut tokens: A) -> Result<(), A::Error> {
        let Self { speller, into } = self;
        let mut count = 0;
        while let Some(odd) = tokens.next_element_seed(Key(speller))? {
            count += 1;
            if count <= 2 {
                into.push(odd, &speller.bytes);
            }
        }
        if count == 2 { Ok(()) } else { Err(A::Error::custom(format!("merge of {count} tokens; expected two"))) }
    }
}

/// An error of the parser with its place in front.
pub fn named(place: &str, error: &serde_json::Error) -> Error {
    let (line, column) = (error.line(), error.column());
    let what = error.to_string();
    let what = what.strip_suffix(&format!(" at line {line} column {column}")).unwrap_or(&what);
    let expected = if what.contains("expected") { "" } else { "; expected a JSON tokenizer" };
    Error::format(format!("{place}: line {line} column {column}"), format!("{what}{expected}"))
}
