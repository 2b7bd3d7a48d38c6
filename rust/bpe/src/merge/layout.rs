//! How training begins: the words laid out as tokens, every pair of neighbours counted and posted.
//!
//! In: distinct words with counts, and the merges that are done already, mostly none. Out: a [`Merger`] and a filled
//! queue. A part of `merge`.

use std::collections::HashMap;

use foldhash::fast::FixedState;

use super::{Cell, Merger, NOWHERE, Neighbour, Posting, lengthen};
use crate::error::{Error, Result};
use crate::hash;
use crate::pages;
use crate::prior::{Prior, Scratch};
use crate::progress::Progress;
use crate::queue::Queue;
use crate::ties::Ties;
use crate::train::{Pair, TokenId};
use crate::words::Words;

/// Bytes between two looks at whether to stop, within a word too.
const LOOK_EVERY: usize = 1 << 18;

/// Postings beyond the first ones for which there is room from the beginning.
const SPARE: usize = 1 << 22;

/// Occurrences of a pair, the words that they are in, and where its next posting goes.
#[derive(Clone, Copy)]
struct Sum {
    count: u64,
    edges: u32,
    to: u32,
}

impl Sum {
    const NONE: Self = Self { count: 0, edges: 0, to: NOWHERE };

    fn add(&mut self, count: u64) -> Result<()> {
        self.edges += 1;
        self.count = self.count.checked_add(count).ok_or_else(|| {
            Error::Config("training: found a pair that occurs 2^64 times or more; expected fewer".into())
        })?;
        Ok(())
    }
}

/// What is known of each pair while the words are laid out: bytes only, or any tokens.
trait Sums {
    fn of(&mut self, pair: Pair) -> &mut Sum;
    /// Every pair that occurs, in the order of its ids: nothing depends on a hash table's.
    fn pairs(&self) -> Vec<Pair>;
}

impl Sums for Vec<Sum> {
    fn of(&mut self, (a, b): Pair) -> &mut Sum {
        &mut self[(a << 8 | b) as usize]
    }

    fn pairs(&self) -> Vec<Pair> {
        (0..).zip(self).filter(|(_, sum)| sum.edges > 0).map(|(n, _): (TokenId, _)| (n >> 8, n & 255)).collect()
    }
}

impl Sums for HashMap<Pair, Sum, FixedState> {
    fn of(&mut self, pair: Pair) -> &mut Sum {
        self.entry(pair).or_insert(Sum::NONE)
    }

    fn pairs(&self) -> Vec<Pair> {
        let mut pairs: Vec<Pair> = self.keys().copied().collect();
        pairs.sort_unstable();
        pairs
    }
}

impl<C: Cell> Merger<C> {
    /// Lays out the words as the tokens that `prior` makes of them (`ties` knows them) and enters their pairs into `queue`.
    ///
    /// # Errors
    /// More than 4 GiB of words; a pair that occurs 2⁶⁴ times or more; [`Error::Interrupted`].
    pub(crate) fn new(
        words: &Words,
        prior: &Prior,
        vocab_size: usize,
        ties: &Ties,
        queue: &mut Queue,
        progress: &Progress,
    ) -> Result<Self> {
        let size = 1 + words.bytes() + words.len();
        if size >= NOWHERE as usize {
            let what = format!("training: found {size} bytes of distinct pre-tokens; expected fewer than 4 GiB");
            return Err(Error::Config(what));
        }
        let sums = vec![Neighbour::default(); vocab_size + 1];
        let cells = Vec::with_capacity(size + 1);
        pages::large(&cells);
        let mut this = Self {
            cells,
            postings: Vec::new(),
            heavy: Vec::new(),
            hole: 0..0,
            neighbours: Vec::new(),
            left: sums.clone(),
            right: sums,
            lefts: Vec::new(),
            rights: Vec::new(),
        };
        if prior.pairs().is_empty() {
            this.lay_out_bytes(words, ties, queue, progress)?;
        } else {
            this.lay_out_tokens(words, prior, ties, queue, progress)?;
        }
        Ok(this)
    }

    /// Every byte a token: what mostly is asked for, and what takes a good part of the time on little text.
    fn lay_out_bytes(&mut self, words: &Words, ties: &Ties, queue: &mut Queue, progress: &Progress) -> Result<()> {
        let mut sums = vec![Sum::NONE; 1 << 16];
        let ids = |pair: &[u8]| (TokenId::from(pair[0]), TokenId::from(pair[1]));
        let mut looked = 0;
        self.cells.push(C::DEAD);
        for (word, count) in words.iter() {
            self.note_heavy(count);
            // One byte over: pairs across the ends of parts are seen once.
            for start in (0..word.len()).step_by(LOOK_EVERY) {
                let part = &word[start..word.len().min(start + LOOK_EVERY + 1)];
                looked += part.len();
                if looked >= LOOK_EVERY {
                    looked = 0;
                    progress.check()?;
                }
                self.cells.extend(part[..part.len().min(LOOK_EVERY)].iter().map(|&byte| C::of(byte.into())));
                for pair in part.windows(2) {
                    sums.of(ids(pair)).add(count)?;
                }
            }
            self.cells.push(C::DEAD);
        }
        self.enter(&mut sums, ties, queue, progress)?;
        let mut at = 1;
        for (word, count) in words.iter() {
            let count = u32::try_from(count).unwrap_or(u32::MAX);
            for start in (0..word.len()).step_by(LOOK_EVERY) {
                let part = &word[start..word.len().min(start + LOOK_EVERY + 1)];
                looked += part.len();
                if looked >= LOOK_EVERY {
                    looked = 0;
                    progress.check()?;
                }
                for pair in part.windows(2) {
                    let to = &mut sums.of(ids(pair)).to;
                    if *to != NOWHERE {
                        self.postings[*to as usize] = Posting { at, count };
                        *to += 1;
                    }
                    at += 1;
                }
            }
            at += 1 + u32::from(!word.is_empty());
        }
        Ok(())
    }

    /// Words as tokens of merges that are done already.
    fn lay_out_tokens(
        &mut self,
        words: &Words,
        prior: &Prior,
        ties: &Ties,
        queue: &mut Queue,
        progress: &Progress,
    ) -> Result<()> {
        let mut sums: HashMap<Pair, Sum, FixedState> = HashMap::with_hasher(hash::state());
        let mut scratch = Scratch::default();
        let mut looked = 0;
        let mut look = |bytes: usize| {
            looked += bytes;
            if looked < LOOK_EVERY {
                return Ok(());
            }
            looked = 0;
            progress.check()
        };
        self.cells.push(C::DEAD);
        for (word, count) in words.iter() {
            look(word.len())?;
            self.note_heavy(count);
            prior.apply(word, &mut scratch, progress)?;
            for &id in &scratch.tokens {
                look(1)?;
                let (start, len) = (self.cells.len(), ties.len_of(id));
                self.cells.resize(start + len, C::DEAD);
                self.cells[start] = C::of(id);
                self.cells[start + len - 1] = C::of(id);
            }
            for pair in scratch.tokens.windows(2) {
                look(1)?;
                sums.of((pair[0], pair[1])).add(count)?;
            }
            self.cells.push(C::DEAD);
        }
        self.enter(&mut sums, ties, queue, progress)?;
        let mut at = 1;
        for (word, count) in words.iter() {
            let count = u32::try_from(count).unwrap_or(u32::MAX);
            let end = at + word.len();
            while at < end {
                look(1)?;
                let (id, next) = (self.cells[at].id(), at + ties.len_of(self.cells[at].id()));
                if next < end {
                    let to = &mut sums.of((id, self.cells[next].id())).to;
                    if *to != NOWHERE {
                        self.postings[*to as usize] = Posting { at: at as u32, count };
                        *to += 1;
                    }
                }
                at = next;
            }
            at += 1;
        }
        Ok(())
    }

    /// Keeps the count of the word that begins here, where a posting has no room for it.
    fn note_heavy(&mut self, count: u64) {
        if count >= NOWHERE.into() {
            self.heavy.push((self.cells.len() as u32, count));
        }
    }

    /// Gives each pair that can ever be merged a place in the queue and room for its postings.
    fn enter(&mut self, sums: &mut impl Sums, ties: &Ties, queue: &mut Queue, progress: &Progress) -> Result<()> {
        let mut from = 0;
        for pair in sums.pairs() {
            let sum = sums.of(pair);
            if queue.wants(ties, pair, sum.count) {
                queue.insert(ties, pair, sum.count, from, sum.edges);
                sum.to = from;
                from += sum.edges;
            }
        }
        // Those of new pairs follow. Room that is not touched costs nothing, but to move all of them does.
        self.postings.reserve(from as usize + (2 * from as usize).min(SPARE));
        pages::large(&self.postings);
        lengthen(&mut self.postings, from as usize, progress)
    }
}
