//! Merges that are there before training begins, and words as the tokens that they make.
//!
//! In: pairs in the order of their merges, then words. Out: tokens of words. Made by `extend` from a tokenizer and by
//! `checkpoint` from a run's own merges; called by `merge`, which lays out the words.
//!
//! Ids are the trainer's: 0–255 are the bytes, merge `n` makes token 256 + `n`. As every merge joins earlier tokens only,
//! a pair that appears when merge `n` is done has a later merge than `n`, or none. So merges can be done one after the
//! other in their order, each once, from the left: the tokens are those of training, and those of encoding.

use std::collections::HashMap;

use foldhash::fast::FixedState;

use crate::error::{Error, Result};
use crate::hash;
use crate::progress::Progress;
use crate::train::{Pair, TokenId};

/// Words up to this length are searched for the next merge; longer ones keep a list of places for each merge.
const SHORT: usize = 256;
/// Steps between two looks at whether to stop.
const LOOK_EVERY: usize = 1 << 16;
const NONE: u32 = u32::MAX;

/// Checked merges.
#[derive(Debug, Clone, Default)]
pub struct Prior {
    pairs: Vec<Pair>,
    /// Bytes of each merge's token.
    lens: Vec<u32>,
    ranks: HashMap<Pair, u32, FixedState>,
}

/// Memory that is used again from word to word.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// The tokens of the word.
    pub(crate) tokens: Vec<TokenId>,
    /// Of each token but the last: the merge of it and the next one.
    next: Vec<u32>,
    /// Of each merge: where its pair appeared, ascending.
    places: Vec<Vec<u32>>,
}

impl Prior {
    /// Checks merges.
    ///
    /// # Errors
    /// [`Error::Config`] for a merge of tokens that are not there yet, a token that is made twice, one that its own
    /// bytes never become.
    pub fn new(pairs: Vec<Pair>) -> Result<Self> {
        let mut prior = Self {
            lens: Vec::with_capacity(pairs.len()),
            ranks: HashMap::with_capacity_and_hasher(pairs.len(), hash::state()),
            pairs: Vec::new(),
        };
        let mut known: HashMap<Vec<u8>, usize, FixedState> = HashMap::with_hasher(hash::state());
        let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        for (n, &(a, b)) in pairs.iter().enumerate() {
            let (Some(left), Some(right)) = (tokens.get(a as usize), tokens.get(b as usize)) else {
                let what = format!(
                    "merge {n}: joins a token that no earlier merge makes; expected merges in the order in which training finds them"
                );
                return Err(Error::Config(what));
            };
            let joined = [left.as_slice(), right].concat();
            if let Some(first) = known.insert(joined.clone(), n) {
                let what = format!(
                    "merge {n}: makes {} again, as merge {first} does; expected one merge for each token",
                    show(&joined)
                );
                return Err(Error::Config(what));
            }
            prior.lens.push(joined.len() as u32);
            prior.ranks.insert((a, b), n as u32);
            tokens.push(joined);
        }
        prior.pairs = pairs;
        let (mut scratch, progress) = (Scratch::default(), Progress::default());
        for (n, token) in tokens[256..].iter().enumerate() {
            prior.apply(token, &mut scratch, &progress)?;
            if scratch.tokens != [256 + n as TokenId] {
                let what = format!(
                    "merge {n}: its token {} is never reached, earlier merges cut it in another way; expected merges that training could have found",
                    show(token)
                );
                return Err(Error::Config(what));
            }
        }
        Ok(prior)
    }

    /// These merges and more, which training has found behind them.
    ///
    /// # Errors
    /// [`Error::Config`] for a merge of tokens that are not there yet.
    pub(crate) fn and(mut self, more: &[Pair]) -> Result<Self> {
        for &(a, b) in more {
            let n = self.pairs.len();
            if a.max(b) as usize >= 256 + n {
                let what = format!("merge {n}: joins a token that no earlier merge makes; expected one that is there");
                return Err(Error::Config(what));
            }
            self.lens.push((self.len_of(a) + self.len_of(b)) as u32);
            self.ranks.insert((a, b), n as u32);
            self.pairs.push((a, b));
        }
        Ok(self)
    }

    /// The merges, in their order.
    pub fn pairs(&self) -> &[Pair] {
        &self.pairs
    }

    /// Bytes of a token.
    fn len_of(&self, id: TokenId) -> usize {
        if id < 256 { 1 } else { self.lens[id as usize - 256] as usize }
    }

    fn rank(&self, a: TokenId, b: TokenId) -> u32 {
        self.ranks.get(&(a, b)).copied().unwrap_or(NONE)
    }

    /// Makes `scratch.tokens` the tokens of a word.
    ///
    /// # Errors
    /// [`Error::Interrupted`], within a word too.
    pub(crate) fn apply(&self, word: &[u8], scratch: &mut Scratch, progress: &Progress) -> Result<()> {
        scratch.tokens.clear();
        scratch.tokens.extend(word.iter().map(|&byte| TokenId::from(byte)));
        if word.len() > SHORT {
            return self.long(scratch, progress);
        }
        self.short(scratch);
        Ok(())
    }

    /// Takes the first of the earliest merges until there is none.
    fn short(&self, Scratch { tokens, next, .. }: &mut Scratch) {
        next.clear();
        next.extend(tokens.windows(2).map(|pair| self.rank(pair[0], pair[1])));
        while let Some((at, &rank)) = next.iter().enumerate().min_by_key(|&(_, rank)| rank) {
            if rank == NONE {
                return;
            }
            tokens[at] = 256 + rank;
            tokens.remove(at + 1);
            next.remove(at);
            if at > 0 {
                next[at - 1] = self.rank(tokens[at - 1], tokens[at]);
            }
            if at < next.len() {
                next[at] = self.rank(tokens[at], tokens[at + 1]);
            }
        }
    }

    /// Every merge once, at the places where its pair appeared. A token's id stands in its first and last cell, as in
    /// `merge`, and what `train` says of postings holds for places.
    fn long(&self, Scratch { tokens: cells, places, .. }: &mut Scratch, progress: &Progress) -> Result<()> {
        places.resize(self.pairs.len(), Vec::new());
        places.iter_mut().for_each(Vec::clear);
        for at in 1..cells.len() {
            if at % LOOK_EVERY == 0 {
                progress.check()?;
            }
            let rank = self.rank(cells[at - 1], cells[at]);
            if rank != NONE {
                places[rank as usize].push(at as u32 - 1);
            }
        }
        let mut steps = 0;
        for (rank, &(a, b)) in self.pairs.iter().enumerate() {
            let (len_a, len_b, id) = (self.len_of(a), self.len_of(b), 256 + rank as TokenId);
            for at in std::mem::take(&mut places[rank]) {
                steps += 1;
                if steps % LOOK_EVERY == 0 {
                    progress.check()?;
                }
                let p = at as usize;
                let (q, end) = (p + len_a, p + len_a + len_b);
                if cells[p] != a || cells[q] != b {
                    continue;
                }
                cells[q - 1] = NONE;
                cells[q] = NONE;
                cells[p] = id;
                cells[end - 1] = id;
                if p > 0 {
                    let left = cells[p - 1];
                    let rank = self.rank(left, id);
                    if rank != NONE {
                        places[rank as usize].push((p - self.len_of(left)) as u32);
                    }
                }
                if end < cells.len() {
                    let rank = self.rank(id, cells[end]);
                    if rank != NONE {
                        places[rank as usize].push(at);
                    }
                }
            }
        }
        let (mut from, mut to) = (0, 0);
        while from < cells.len() {
            let id = cells[from];
            cells[to] = id;
            to += 1;
            from += self.len_of(id);
        }
        cells.truncate(to);
        Ok(())
    }
}

/// A token in a message: quoted, cut where it is long.
pub(crate) fn show(token: &[u8]) -> String {
    const MOST: usize = 40;
    let text = String::from_utf8_lossy(&token[..token.len().min(MOST)]).into_owned();
    let more = if token.len() > MOST { format!("… ({} bytes)", token.len()) } else { String::new() };
    format!("{text:?}{more}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn long_words_become_what_short_ones_do(
            word in "[ab]{1,200}|a{1,200}", joins in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 0..30),
        ) {
            let mut pairs: Vec<Pair> = Vec::new();
            for (a, b) in joins {
                let pick = |i: prop::sample::Index| match i.index(2 + pairs.len()) { n @ 0..2 => 97 + n as u32, n => 254 + n as u32 };
                let pair = (pick(a), pick(b));
                if !pairs.contains(&pair) {
                    pairs.push(pair);
                }
            }
            let prior = Prior::default().and(&pairs).unwrap();
            let (mut short, mut long) = (Scratch::default(), Scratch::default());
            short.tokens.extend(word.bytes().map(u32::from));
            long.tokens.clone_from(&short.tokens);
            prior.short(&mut short);
            prior.long(&mut long, &Progress::default()).unwrap();
            prop_assert_eq!(short.tokens, long.tokens);
        }
    }

    #[test]
    fn odd_merges_are_refused_by_name() {
        let refused = |pairs: &[Pair]| Prior::new(pairs.to_vec()).unwrap_err().to_string();
        assert!(refused(&[(97, 257), (97, 98)]).contains("merge 0: joins a token that no earlier merge makes"));
        assert!(
            refused(&[(97, 98), (98, 99), (256, 99), (97, 257)]).contains("merge 3: makes \"abc\" again, as merge 2")
        );
        assert!(refused(&[(97, 98), (98, 99), (97, 257)]).contains("its token \"abc\" is never reached"));
        assert!(Prior::new(vec![(97, 98), (256, 99)]).is_ok());
    }
}
