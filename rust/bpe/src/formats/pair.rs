//! GPT-2's `vocab.json` and `merges.txt`, read; and the same two given as bytes.
//!
//! In: two files, or tokens and merges. Out: a [`Vocab`]. What is neither a byte nor a merge's result is a special token.

use std::path::Path;

use serde::de::DeserializeSeed;

use super::listing::{Halves, Seed, Speller, Tokens, named};
use super::parts::{add_specials, rules};
use super::{SpecialNames, at_place, read_bytes, text_of};
use crate::alphabet::Alphabet;
use crate::error::{Error, Result};
use crate::listed::Listed;
use crate::token_bytes::TokenBytes;
use crate::train::TokenId;
use crate::vocab::Vocab;

/// Reads GPT-2's pair of files.
pub fn read_vocab_and_merges(
    vocab: &Path,
    merges: &Path,
    specials: Option<&SpecialNames>,
    pattern: &str,
) -> Result<Vocab> {
    let place = vocab.display().to_string();
    from_vocab_and_merges((&read_bytes(vocab)?, &place), merges, specials, pattern)
}

/// The same with the vocabulary's bytes and place.
pub(super) fn from_vocab_and_merges(
    (vocab, place): (&[u8], &str),
    merges: &Path,
    specials: Option<&SpecialNames>,
    pattern: &str,
) -> Result<Vocab> {
    let alphabet = Alphabet::new();
    let mut speller = Speller::new(&alphabet);
    let mut tokens = None;
    let mut parser = serde_json::Deserializer::from_str(text_of(vocab, place)?);
    let read = Seed::<Tokens> { speller: &mut speller, into: &mut tokens }.deserialize(&mut parser);
    read.and_then(|()| parser.end()).map_err(|e| named(place, &e))?;
    let tokens = tokens.ok_or_else(|| Error::format(place, "a list; expected a JSON object of tokens and ids"))?;
    let halves = read_merges(merges, &mut speller)?;
    // Special tokens are written as their text, whether or not the alphabet has its characters.
    let text = |bytes: &[u8], _: TokenId| Ok(alphabet.text(bytes));
    join(tokens, &halves, specials, pattern, text).map_err(|e| at_place(place, e))
}

fn read_merges(path: &Path, speller: &mut Speller<'_>) -> Result<TokenBytes> {
    let place = path.display().to_string();
    let bytes = read_bytes(path)?;
    let mut halves = Halves::default();
    for (line, text) in (1..).zip(text_of(&bytes, &place)?.lines()) {
        if (line == 1 && text.starts_with("#version")) || text.trim().is_empty() {
            continue;
        }
        halves.push_text(text, speller);
        if halves.odd.is_some() {
            let what = format!("found {text:?}; expected two tokens and a space");
            return Err(Error::format(format!("{place}: line {line}"), what));
        }
    }
    Ok(halves.bytes)
}

/// Joins tokens and merges given as bytes.
pub fn from_parts(
    tokens: &[(Vec<u8>, TokenId)],
    merges: &[(Vec<u8>, Vec<u8>)],
    specials: Option<&SpecialNames>,
    pattern: &str,
) -> Result<Vocab> {
    let listed = Tokens {
        bytes: tokens.iter().map(|token| &token.0).collect(),
        ids: tokens.iter().map(|token| token.1).collect(),
        raw: Vec::new(),
    };
    let halves = merges.iter().flat_map(|(a, b)| [a, b]).collect();
    join(listed, &halves, specials, pattern, |bytes, id| {
        String::from_utf8(bytes.to_vec()).map_err(|_| {
            Error::Config(format!("token {id}: {bytes:?} is neither a byte nor a merge's result; expected one of them, or a special token's text"))
        })
    })
}

fn join(
    tokens: Tokens,
    halves: &TokenBytes,
    specials: Option<&SpecialNames>,
    pattern: &str,
    text: impl Fn(&[u8], TokenId) -> Result<String>,
) -> Result<Vocab> {
    let mut listed = Listed::new(tokens.bytes, tokens.ids)?;
    let mut made = vec![false; listed.len()];
    let rules = rules(halves, &listed, |place| made[place as usize] = true)?;
    let mut found = tokens.raw;
    for place in (0..).zip(made).filter(|(_, made)| !made).map(|(place, _)| place) {
        if listed.token(place).len() > 1 {
            found.push((text(listed.token(place), listed.id(place))?, listed.id(place)));
            listed.remove(place);
        }
    }
    let specials = add_specials(&listed, found, specials)?;
    Vocab::from_listed(listed, rules, specials, pattern, false)
}
