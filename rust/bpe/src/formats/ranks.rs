//! tiktoken's ranks: a line a token, its base64 and its rank, which is its id.
//!
//! In: the file, or tokens with ranks. Out: a [`Vocab`] that encodes as tiktoken does.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use super::parts::add_specials;
use super::{SpecialNames, at_place};
use crate::error::{Error, Result};
use crate::listed::Listed;
use crate::token_bytes::TokenBytes;
use crate::train::TokenId;
use crate::vocab::{Merge, Vocab};

/// Reads a `.tiktoken` file.
pub(super) fn from_tiktoken(
    bytes: &[u8],
    place: &str,
    specials: Option<&SpecialNames>,
    pattern: &str,
) -> Result<Vocab> {
    let (mut tokens, mut ids, mut token) = (TokenBytes::default(), Vec::new(), Vec::new());
    for (line, text) in (1..).zip(bytes.split(|&b| b == b'\n')) {
        if text.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        token.clear();
        let rank = str::from_utf8(text).ok().and_then(|text| {
            let (base64, rank) = text.trim_end().split_once(' ')?;
            BASE64.decode_vec(base64, &mut token).ok()?;
            rank.parse().ok()
        });
        ids.push(rank.ok_or_else(|| {
            Error::format(
                format!("{place}: line {line}"),
                "not a base64 token and a rank; expected tiktoken ranks, or a JSON tokenizer",
            )
        })?);
        tokens.push(&token);
    }
    of_listed((tokens, ids), specials, pattern).map_err(|e| at_place(place, e))
}

/// A vocabulary of tokens and their ranks, which are their ids.
pub fn from_ranks(tokens: &[(Vec<u8>, TokenId)], specials: Option<&SpecialNames>, pattern: &str) -> Result<Vocab> {
    let listed = (tokens.iter().map(|token| &token.0).collect(), tokens.iter().map(|token| token.1).collect());
    of_listed(listed, specials, pattern)
}

fn of_listed(
    (tokens, ids): (TokenBytes, Vec<TokenId>),
    specials: Option<&SpecialNames>,
    pattern: &str,
) -> Result<Vocab> {
    let listed = Listed::new(tokens, ids)?;
    let merges = merges_of_ranks(&listed);
    let makes_all = merges.is_some();
    let merges = merges.unwrap_or_else(|| all_splits(&listed));
    let specials = add_specials(&listed, Vec::new(), specials)?;
    let vocab = Vocab::from_listed(listed, merges, specials, pattern, true)?;
    Ok(if makes_all { vocab.that_makes_all() } else { vocab })
}

/// The merges that ranks imply: each token's bytes, merged by lower ranks only, must end as two tokens.
///
/// By induction this list encodes as tiktoken does: until a token's rank is reached, the bytes between two
/// borders that no merge crosses are merged as they would be alone; so where two parts that join to the token
/// are neighbours at that moment, they are the two parts listed. `None` where a token ends as more than two
/// parts (it is reached through no single merge).
pub(super) fn merges_of_ranks(listed: &Listed) -> Option<Vec<Merge>> {
    let mut longer: Vec<u32> = (0..listed.len() as u32).filter(|&place| listed.token(place).len() > 1).collect();
    longer.sort_by_key(|&place| listed.id(place));
    let mut merges = Vec::with_capacity(longer.len());
    let mut room = Room::default();
    for (rank, place) in (0u32..).zip(longer) {
        let (bytes, id) = (listed.token(place), listed.id(place));
        let id_of = |bytes: &[u8]| listed.find(bytes).map(|place| listed.id(place));
        let joined = |from: usize, to: usize| id_of(&bytes[from..to]).filter(|&rank| rank < id).unwrap_or(NO_RANK);
        let middle = match bytes.len() {
            2 => 1,
            ..=SHORT => middle_by_scanning(bytes.len(), joined, &mut room)?,
            _ => middle_by_heap(bytes.len(), joined)?,
        };
        merges.push(Merge { pair: (id_of(&bytes[..middle])?, id_of(&bytes[middle..])?), id, rank });
    }
    Some(merges)
}

/// Longest token that is merged by scanning.
const SHORT: usize = 64;

/// Borders of the parts, and for each part but the last the rank of it and the next one joined.
#[derive(Default)]
struct Room {
    borders: Vec<usize>,
    joins: Vec<TokenId>,
}

/// Where the second of the two parts begins that a token of `len` bytes ends as, if each time the two neighbours with the
/// lowest rank are joined; `joined` tells the rank of bytes from here to there.
fn middle_by_scanning(len: usize, joined: impl Fn(usize, usize) -> TokenId, room: &mut Room) -> Option<usize> {
    let Room { borders, joins } = room;
    borders.clear();
    borders.extend(0..=len);
    joins.clear();
    joins.extend((0..len - 1).map(|at| joined(at, at + 2)));
    while borders.len() > 3 {
        let (at, &best) = joins.iter().enumerate().min_by_key(|&(at, &rank)| (rank, at))?;
        if best == NO_RANK {
            return None;
        }
        borders.remove(at + 1);
        joins.remove(at);
        for left in at.saturating_sub(1)..=at {
            if left + 2 < borders.len() {
                joins[left] = joined(borders[left], borders[left + 2]);
            }
        }
    }
    Some(borders[1])
}

/// The same for long tokens, n log n instead of n²: a list of parts, each by its first byte, and a heap of (rank, part).
/// An entry is stale where its part has another rank by now.
fn middle_by_heap(len: usize, joined: impl Fn(usize, usize) -> TokenId) -> Option<usize> {
    let mut next: Vec<usize> = (1..=len).collect();
    let mut previous: Vec<usize> = (0..len).map(|at| at.saturating_sub(1)).collect();
    let mut ranks: Vec<TokenId> = (0..len - 1).map(|at| joined(at, at + 2)).chain([NO_RANK]).collect();
    let known = ranks.iter().enumerate().filter(|(_, rank)| **rank != NO_RANK);
    let mut heap: BinaryHeap<_> = known.map(|(at, &rank)| Reverse((rank, at))).collect();
    let mut parts = len;
    while parts > 2 {
        let Reverse((rank, at)) = heap.pop()?;
        if ranks[at] != rank {
            continue;
        }
        parts -= 1;
        let gone = next[at];
        let end = next[gone];
        next[at] = end;
        ranks[gone] = NO_RANK;
        ranks[at] = NO_RANK;
        let mut join = |left: usize, to: usize| {
            ranks[left] = joined(left, to);
            if ranks[left] != NO_RANK {
                heap.push(Reverse((ranks[left], left)));
            }
        };
        if end < len {
            previous[end] = at;
            join(at, next[end]);
        }
        if at > 0 {
            join(previous[at], end);
        }
    }
    Some(next[0])
}

const NO_RANK: TokenId = TokenId::MAX;

/// Every way to cut a token into two tokens, with the token's rank: tiktoken's own rule, word for word.
fn all_splits(listed: &Listed) -> Vec<Merge> {
    let mut merges: Vec<Merge> = Vec::new();
    for place in 0..listed.len() as u32 {
        let (bytes, id) = (listed.token(place), listed.id(place));
        for middle in 1..bytes.len() {
            if let (Some(a), Some(b)) = (listed.find(&bytes[..middle]), listed.find(&bytes[middle..])) {
                merges.push(Merge { pair: (listed.id(a), listed.id(b)), id, rank: id });
            }
        }
    }
    merges.sort_by_key(|m| (m.rank, m.pair));
    merges
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn the_heap_finds_what_scanning_finds(
            text in "[ab]{3,90}",
            ranks in prop::collection::btree_map("[ab]{2,9}", 0u32..20, 0..40),
        ) {
            let joined = |from: usize, to: usize| ranks.get(&text[from..to]).copied().unwrap_or(NO_RANK);
            prop_assert_eq!(
                middle_by_heap(text.len(), joined),
                middle_by_scanning(text.len(), joined, &mut Room::default())
            );
        }
    }
}
