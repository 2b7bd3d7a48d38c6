//! Tokens, merges and special tokens of a file, joined.
//!
//! In: what `listing` has read. Out: merges as ids, special tokens with their ids. Called by `json`, `pair` and `ranks`.

use std::collections::HashMap;

use foldhash::fast::FixedState;

use super::SpecialNames;
use crate::error::{Error, Result};
use crate::listed::Listed;
use crate::token_bytes::TokenBytes;
use crate::train::TokenId;
use crate::vocab::Merge;

/// The merges of pairs of byte strings, which lie one behind the other. `made` is told the place of each result.
pub fn rules(halves: &TokenBytes, listed: &Listed, mut made: impl FnMut(u32)) -> Result<Vec<Merge>> {
    let missing = |rank: u32, bytes: &[u8]| {
        Error::Config(format!(
            "merge {rank}: {:?} is not in the vocabulary; expected merges of its tokens",
            String::from_utf8_lossy(bytes)
        ))
    };
    let mut rules = Vec::with_capacity(halves.len() / 2);
    // Files list merged tokens in the order of their merges: the next one is found without looking for it.
    let mut guess = 0;
    for rank in 0..(halves.len() / 2) as u32 {
        let find = |bytes: &[u8]| listed.find(bytes).ok_or_else(|| missing(rank, bytes));
        let joined = halves.with_next(2 * rank);
        let place = if listed.is_at(guess, joined) { guess } else { find(joined)? };
        guess = place + 1;
        made(place);
        let (a, b) = (find(&halves[2 * rank])?, find(&halves[2 * rank + 1])?);
        rules.push(Merge { pair: (listed.id(a), listed.id(b)), id: listed.id(place), rank });
    }
    Ok(rules)
}

/// Adds the caller's special tokens to those of the file; those without an id get the next ones behind all others.
pub fn add_specials(
    listed: &Listed,
    mut found: Vec<(String, TokenId)>,
    asked: Option<&SpecialNames>,
) -> Result<Vec<(String, TokenId)>> {
    let Some(asked) = asked else { return Ok(found) };
    let given = found.iter().map(|special| special.1).chain(asked.iter().filter_map(|special| special.1));
    let mut next = given.chain(listed.ids().iter().copied()).max().map_or(0, |last| last.saturating_add(1));
    let known: HashMap<String, TokenId, FixedState> = found.iter().cloned().collect();
    for (text, id) in asked {
        match (known.get(text), id) {
            (Some(known), Some(id)) if known != id => {
                return Err(Error::Config(format!(
                    "special token {text:?}: found id {id}; expected {known}, as the file has it"
                )));
            }
            (Some(_), _) => {}
            (None, Some(id)) => found.push((text.clone(), *id)),
            (None, None) => {
                found.push((text.clone(), next));
                next = next.saturating_add(1);
            }
        }
    }
    Ok(found)
}
