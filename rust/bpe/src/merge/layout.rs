//! How training begins: the words laid out as tokens, every pair of neighbours counted and posted.
//!
//! In: distinct words with counts, and the merges that are done already, mostly none. Out: a [`Merger`] and a filled
//! queue. A part of `merge`.

use std::collections::HashMap;
use std::ops::Range;
use std::thread;

use foldhash::fast::FixedState;

use super::{Cell, Merger, NOWHERE, Neighbour, Posting, lengthen};
use crate::error::{Error, Result};
use crate::hash;
use crate::pages;
use crate::prior::{Prior, Scratch};
use crate::progress::Progress;
use crate::queue::Queue;
use crate::ties::Ties;
use crate::train::{Options, Pair, TokenId};
use crate::words::Words;

/// Bytes between two looks at whether to stop, within a word too.
const LOOK_EVERY: usize = 1 << 18;

/// Postings beyond the first ones for which there is room from the beginning.
const SPARE: usize = 1 << 22;

/// Bytes of words for each thread: its sums, 1.5 MB, are then less than a tenth of what merging needs (`counts::need`).
const BYTES_A_THREAD: usize = if cfg!(test) { 1 } else { 1 << 19 };

/// How often a pair occurs: in the text, and in distinct words.
#[derive(Clone, Copy, Default)]
struct Sum {
    count: u64,
    edges: u32,
}

impl Sum {
    fn add(&mut self, other: Self) -> Result<()> {
        self.edges += other.edges;
        self.count = self.count.checked_add(other.count).ok_or_else(|| {
            Error::Config("training: found a pair that occurs 2^64 times or more; expected fewer".into())
        })?;
        Ok(())
    }
}

/// The first cell of a word and its count.
type Heavy = (u32, u64);
/// A pair that may be merged, its occurrences in distinct words, and where its postings begin.
type Entered = (Pair, u32, u32);

/// Number of a pair of bytes.
fn number(pair: &[u8]) -> usize {
    usize::from(pair[0]) << 8 | usize::from(pair[1])
}

/// A word cut where one may stop; each piece but the last ends with the first byte of the next, so that every pair lies
/// in one piece.
fn pieces(word: &[u8]) -> impl Iterator<Item = &[u8]> {
    (0..word.len()).step_by(LOOK_EVERY).map(|start| &word[start..word.len().min(start + LOOK_EVERY + 1)])
}

/// Looks whether to stop, every so many bytes.
struct Look<'p> {
    progress: &'p Progress,
    bytes: usize,
}

impl<'p> Look<'p> {
    fn new(progress: &'p Progress) -> Self {
        Self { progress, bytes: 0 }
    }

    fn at(&mut self, bytes: usize) -> Result<()> {
        self.bytes += bytes;
        if self.bytes < LOOK_EVERY {
            return Ok(());
        }
        self.bytes = 0;
        self.progress.check()
    }
}

/// Does each job on a thread of its own, the last one on this.
fn on_threads<J: Send, R: Send>(mut jobs: Vec<J>, work: impl Fn(J) -> Result<R> + Sync) -> Result<Vec<R>> {
    let work = &work;
    let last = jobs.pop();
    thread::scope(|scope| {
        let others: Vec<_> = jobs.into_iter().map(|job| scope.spawn(move || work(job))).collect();
        let last = last.map(work);
        // A panic in a thread is a defect of ours; let it go on as one.
        let join = |other: thread::ScopedJoinHandle<'_, _>| {
            other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        others.into_iter().map(join).chain(last).collect()
    })
}

impl<C: Cell> Merger<C> {
    /// Lays out the words as the tokens that the prior merges make of them (`ties` knows them) and enters their pairs into `queue`.
    ///
    /// # Errors
    /// More than 4 GiB of words; a pair that occurs 2⁶⁴ times or more; [`Error::Interrupted`].
    pub(crate) fn new(
        words: &Words,
        options: &Options,
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
        if options.prior.pairs().is_empty() {
            this.lay_out_bytes(words, ties, queue, options.threads, progress)?;
        } else {
            this.lay_out_tokens(words, &options.prior, ties, queue, progress)?;
        }
        Ok(this)
    }

    /// Every byte a token: what mostly is asked for, and what takes a good part of the time on little text.
    ///
    /// Each thread writes the cells of some words and counts their pairs; then, of all words, each posts some pairs. What
    /// comes out is the same for any number of threads.
    fn lay_out_bytes(
        &mut self,
        words: &Words,
        ties: &Ties,
        queue: &mut Queue,
        threads: usize,
        progress: &Progress,
    ) -> Result<()> {
        let threads = threads.min(words.bytes() / BYTES_A_THREAD).max(1);
        let size = 1 + words.bytes() + words.len();
        while self.cells.len() < size {
            progress.check()?;
            self.cells.resize(size.min(self.cells.len() + LOOK_EVERY), C::DEAD);
        }
        let mut parts = Vec::with_capacity(threads);
        let mut rest = &mut self.cells[1..];
        for part in words.split(threads) {
            let bytes = words.start_of(part.end) - words.start_of(part.start);
            let (cells, behind) = rest.split_at_mut(bytes + part.len());
            parts.push((part, cells));
            rest = behind;
        }
        let counted = on_threads(parts, |(part, cells)| count_bytes(words, part, cells, progress))?;
        let mut sums = vec![Sum::default(); 1 << 16];
        for (part, heavy) in counted {
            self.heavy.extend(heavy);
            sums.iter_mut().zip(part).try_for_each(|(sum, other)| sum.add(other))?;
        }
        let pairs = (0..).zip(&sums).filter(|(_, sum)| sum.edges > 0);
        let pairs = pairs.map(|(n, &sum): (TokenId, _)| ((n >> 8, n & 255), sum));
        let entered = self.enter(pairs, threads, ties, queue, progress)?;
        let mut shares = Vec::with_capacity(threads);
        let mut rest = &mut self.postings[..];
        for pairs in entered {
            let (postings, behind) = rest.split_at_mut(places(&pairs));
            shares.push((pairs, postings));
            rest = behind;
        }
        on_threads(shares, |(pairs, postings)| post_bytes(words, &pairs, postings, progress))?;
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
        let mut look = Look::new(progress);
        self.cells.push(C::DEAD);
        for (word, count) in words.iter() {
            look.at(word.len())?;
            self.heavy.extend(heavy(self.cells.len(), count));
            prior.apply(word, &mut scratch, progress)?;
            for &id in &scratch.tokens {
                look.at(1)?;
                let (start, len) = (self.cells.len(), ties.len_of(id));
                self.cells.resize(start + len, C::DEAD);
                self.cells[start] = C::of(id);
                self.cells[start + len - 1] = C::of(id);
            }
            for pair in scratch.tokens.windows(2) {
                look.at(1)?;
                sums.entry((pair[0], pair[1])).or_default().add(Sum { count, edges: 1 })?;
            }
            self.cells.push(C::DEAD);
        }
        let mut pairs: Vec<(Pair, Sum)> = sums.into_iter().collect();
        pairs.sort_unstable_by_key(|&(pair, _)| pair);
        let entered = self.enter(pairs.into_iter(), 1, ties, queue, progress)?;
        let mut places: HashMap<Pair, u32, FixedState> = HashMap::with_hasher(hash::state());
        places.extend(entered.iter().flatten().map(|&(pair, _, from)| (pair, from)));
        let mut at = 1;
        for (word, count) in words.iter() {
            let count = u32::try_from(count).unwrap_or(u32::MAX);
            let end = at + word.len();
            while at < end {
                look.at(1)?;
                let (id, next) = (self.cells[at].id(), at + ties.len_of(self.cells[at].id()));
                if next < end
                    && let Some(to) = places.get_mut(&(id, self.cells[next].id()))
                {
                    self.postings[*to as usize] = Posting { at: at as u32, count };
                    *to += 1;
                }
                at = next;
            }
            at += 1;
        }
        Ok(())
    }

    /// Gives each pair that can ever be merged a place in the queue and room for its postings, in the order given, in so
    /// many runs with about as many postings each; behind each run there is a place that is nobody's.
    fn enter(
        &mut self,
        pairs: impl Iterator<Item = (Pair, Sum)>,
        runs: usize,
        ties: &Ties,
        queue: &mut Queue,
        progress: &Progress,
    ) -> Result<Vec<Vec<Entered>>> {
        let pairs: Vec<_> = pairs.filter(|&(pair, sum)| queue.wants(ties, pair, sum.count)).collect();
        let all: usize = pairs.iter().map(|(_, sum)| sum.edges as usize).sum();
        let mut entered = vec![Vec::new(); runs];
        let (mut from, mut done, mut run) = (0, 0, 0);
        for (pair, sum) in pairs {
            while done >= (all / runs).max(1) * (run + 1) && run + 1 < runs {
                (run, from) = (run + 1, from + 1);
            }
            queue.insert(ties, pair, sum.count, from, sum.edges);
            entered[run].push((pair, sum.edges, from));
            (from, done) = (from + sum.edges, done + sum.edges as usize);
        }
        let len = entered.iter().map(|run| places(run)).sum::<usize>();
        // Those of new pairs follow. Room that is not touched costs nothing, but to move all of them does.
        self.postings.reserve(len + (2 * len).min(SPARE));
        pages::large(&self.postings);
        lengthen(&mut self.postings, len, progress)?;
        Ok(entered)
    }
}

/// Places of a run of pairs, with the one that is nobody's.
fn places(run: &[Entered]) -> usize {
    1 + run.iter().map(|pair| pair.1 as usize).sum::<usize>()
}

/// Of a word that occurs so often that a posting has no room for it.
fn heavy(first: usize, count: u64) -> Option<Heavy> {
    (count >= u32::MAX.into()).then_some((first as u32, count))
}

/// Writes the bytes of some words into their cells, the first of which is `cells[0]`, and counts their pairs.
fn count_bytes<C: Cell>(
    words: &Words,
    part: Range<usize>,
    cells: &mut [C],
    progress: &Progress,
) -> Result<(Vec<Sum>, Vec<Heavy>)> {
    let (mut sums, mut heavies) = (vec![Sum::default(); 1 << 16], Vec::new());
    let mut look = Look::new(progress);
    // Cells before this part's: a border, and behind each word another.
    let before = 1 + words.start_of(part.start) + part.start;
    let mut at = 0;
    for (word, count) in words.part(part) {
        heavies.extend(heavy(before + at, count));
        let own = &mut cells[at..at + word.len()];
        for (piece, own) in pieces(word).zip(own.chunks_mut(LOOK_EVERY)) {
            look.at(piece.len())?;
            for pair in piece.windows(2) {
                sums[number(pair)].add(Sum { count, edges: 1 })?;
            }
            for (cell, &byte) in own.iter_mut().zip(piece) {
                *cell = C::of(byte.into());
            }
        }
        at += word.len() + 1;
    }
    Ok((sums, heavies))
}

/// Writes the postings of some pairs, which lie one behind the other, the first one's at `postings[0]`.
fn post_bytes(words: &Words, pairs: &[Entered], postings: &mut [Posting], progress: &Progress) -> Result<()> {
    let Some(&(_, _, before)) = pairs.first() else { return Ok(()) };
    // What is another thread's goes to the place that is nobody's: a branch would often be guessed wrongly.
    let nowhere = postings.len() as u32 - 1;
    let mut places = vec![(nowhere, 0); 1 << 16];
    for &((a, b), _, from) in pairs {
        places[(a << 8 | b) as usize] = (from - before, 1);
    }
    let mut look = Look::new(progress);
    let mut at = 1;
    for (word, count) in words.iter() {
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        for piece in pieces(word) {
            look.at(piece.len())?;
            for pair in piece.windows(2) {
                let (to, step) = &mut places[number(pair)];
                postings[*to as usize] = Posting { at, count };
                *to += *step;
                at += 1;
            }
        }
        at += 1 + u32::from(!word.is_empty());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use crate::naive;
    use crate::progress::Progress;
    use crate::ties::TieBreak;
    use crate::train::{Options, train};

    /// Small ones, and those for which a posting has no room.
    fn count() -> impl Strategy<Value = u64> {
        prop_oneof![1u64..9, 0xffff_fffdu64..1 << 40]
    }

    proptest! {
        /// A byte makes a thread worth starting here, so that words without a byte, threads without a word and threads
        /// without a pair occur.
        #[test]
        fn every_number_of_threads_equals_the_specification(
            words in prop::collection::btree_map("[ab\u{e9}]{0,7}", count(), 0..12),
            rule in prop::sample::select(vec![TieBreak::Lexicographic, TieBreak::HuggingFace, TieBreak::RawBytes]),
            threads in 1usize..9,
            min_frequency in 1u64..5,
            max_token_length in prop::sample::select(vec![2usize, 4, usize::MAX]),
        ) {
            let words: Vec<_> = words.into_iter().map(|(word, count)| (word.into_bytes(), count)).collect();
            let options = Options { min_frequency, max_token_length, threads, ..Options::new(20, rule) };
            let fast = train(&words.iter().cloned().collect(), &options, &Progress::default()).unwrap();
            prop_assert_eq!(fast, naive::train(&words, &options));
        }
    }
}
