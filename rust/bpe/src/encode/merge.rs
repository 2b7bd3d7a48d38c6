//! A word's bytes → its ids: the merges themselves.
//!
//! In: a [`Vocab`]'s merges, laid out for one width of ids. Out: the ids of a word. Called by `words`.
//!
//! Up to [`WINDOW`] bytes go to `window`, longer words window by window, see [`Core::merge_long`]. What neither can do goes
//! to a heap (n log n).

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::OnceLock;

use bytekiln_simd::Level;

use super::ids::{Id, no_memory};
use super::pairs::Pairs;
use super::window::WINDOW;
use crate::error::Result;
use crate::vocab::Vocab;

/// Ids at a window's end that its border may have made wrong; the next window begins before them.
const DOUBTFUL: usize = 3;

/// The merges of a vocabulary.
#[derive(Debug)]
pub(super) struct Core<I: Id> {
    pub(super) pairs: Pairs<I>,
    pub(super) byte_ids: [I; 256],
    /// Ranks of the pairs of bytes: what every word begins with.
    pub(super) byte_ranks: Box<[I]>,
    results: Vec<I>,
    /// What a rank's merges make less that rank, where it is the same for all.
    ahead: Option<u32>,
    /// Merges of equal rank have one result, so that windows may be used.
    pub(super) has_results: bool,
    /// How each token is made, where there is one way only and the parts are made before.
    splits: OnceLock<Option<Splits<I>>>,
    pub(super) level: Level,
}

/// How tokens are made: by their ids.
#[derive(Debug)]
struct Splits<I>(Vec<Split<I>>);

#[derive(Debug, Clone, Copy)]
struct Split<I> {
    left: I,
    right: I,
    /// 1 more than the rank of the merge; 0: a byte.
    made: u32,
}

/// Buffers of a thread.
#[derive(Debug, Default)]
pub(super) struct Buffers<I> {
    /// The ids of the word that was merged last.
    pub(super) ids: Vec<I>,
    stretch: Vec<I>,
    heap: Heap<I>,
    /// Windows that were merged and thrown away.
    #[cfg(test)]
    pub(super) redone: usize,
}

#[derive(Debug, Default)]
struct Heap<I> {
    ids: Vec<I>,
    /// Rank and result of each part with the next.
    joins: Vec<(I, I)>,
    next: Vec<u32>,
    previous: Vec<u32>,
    queue: BinaryHeap<Reverse<(I, u32)>>,
}

impl<I: Id> Buffers<I> {
    /// Gives up what a huge word has left behind.
    pub(super) fn shrink(&mut self) {
        const MOST: usize = 1 << 16;
        let Heap { ids, joins, next, previous, queue } = &mut self.heap;
        self.ids.shrink_to(MOST);
        self.stretch.shrink_to(MOST);
        ids.shrink_to(MOST);
        joins.shrink_to(MOST);
        next.shrink_to(MOST);
        previous.shrink_to(MOST);
        queue.shrink_to(MOST);
    }
}

impl<I: Id> Core<I> {
    /// Lays the merges out. The ids of `vocab` fit, and so do its ranks ([`ranks_fit`]).
    pub(super) fn new(vocab: &Vocab, level: Level) -> Self {
        let merges = vocab.merges();
        let dense = dense_ranks(vocab);
        let mut results = vec![I::default(); dense.iter().max().map_or(0, |&rank| rank as usize + 1)];
        let (mut given, mut has_results) = (vec![false; results.len()], true);
        for (merge, &rank) in merges.iter().zip(&dense) {
            let (result, given) = (&mut results[rank as usize], &mut given[rank as usize]);
            has_results &= !*given || *result == I::of(merge.id);
            (*result, *given) = (I::of(merge.id), true);
        }
        let ahead = results.first().map(|&first: &I| first.number());
        let ahead = ahead.filter(|&ahead| (ahead..).zip(&results).all(|(id, &result)| I::of(id) == result));
        let pairs = Pairs::new(merges, &dense);
        let byte_ids = vocab.byte_ids().map(I::of);
        let mut byte_ranks = vec![I::NONE; 1 << 16];
        let mut byte_of = vec![None; vocab.len()];
        for (byte, &id) in (0u8..=255).zip(vocab.byte_ids()) {
            byte_of[id as usize] = Some(byte);
        }
        for merge in merges {
            if let (Some(a), Some(b)) = (byte_of[merge.pair.0 as usize], byte_of[merge.pair.1 as usize]) {
                byte_ranks[usize::from(a) << 8 | usize::from(b)] = pairs.rank(I::of(merge.pair.0), I::of(merge.pair.1));
            }
        }
        let byte_ranks = byte_ranks.into();
        Self { pairs, byte_ids, byte_ranks, results, ahead, has_results, splits: OnceLock::new(), level }
    }

    /// What the merges of a rank make.
    #[inline]
    pub(super) fn result(&self, rank: I) -> I {
        match self.ahead {
            Some(ahead) => I::of(rank.number().wrapping_add(ahead)),
            None => self.results[rank.place()],
        }
    }

    /// The ids of a word, in `buffers.ids`.
    ///
    /// # Errors
    /// [`Error::Memory`](crate::error::Error::Memory), of a long one.
    pub(super) fn merge(&self, word: &[u8], vocab: &Vocab, buffers: &mut Buffers<I>) -> Result<()> {
        let Buffers { ids, heap, .. } = buffers;
        ids.clear();
        if vocab.looks_for_words()
            && let Some(id) = vocab.id_of(word)
        {
            ids.push(I::of(id));
            return Ok(());
        }
        // There are never more of them, so that what follows asks for no memory.
        ids.try_reserve(word.len()).map_err(no_memory)?;
        if !self.has_results {
            return self.merge_by_heap(word, heap, ids);
        }
        if word.len() <= WINDOW {
            self.merge_window(word, ids);
            return Ok(());
        }
        match self.splits.get_or_init(|| Splits::new(vocab)) {
            Some(splits) => self.merge_long(word, vocab, splits, buffers),
            None => self.merge_by_heap(word, heap, ids),
        }
    }

    /// Appends the ids of at most [`WINDOW`] bytes.
    fn merge_window(&self, bytes: &[u8], out: &mut Vec<I>) {
        let mut window = self.open(bytes);
        self.merge_windows(std::slice::from_mut(&mut window));
        out.extend(window.ids());
    }

    /// The ids of a word of any length, in time that grows as the length does.
    ///
    /// Lemma. Ids are those of their bytes if each is that of its own bytes and each two neighbours are those of theirs.
    /// For think of the first merge, in the order of the whole, that crosses a border between two of them: until then all
    /// merges were inside of ids, and inside of these two in the order in which they alone would be merged; so these two
    /// alone would be merged across their border as well.
    ///
    /// So a stretch of bytes is merged by itself, its last ids are dropped as its end may have made them wrong, and the
    /// next stretch begins there. If the two ids at the joint are not those of their bytes, ids before it are dropped too,
    /// and stretches become longer, each twice the one before, until one ends behind that joint, or has all that is left.
    fn merge_long(&self, word: &[u8], vocab: &Vocab, splits: &Splits<I>, buffers: &mut Buffers<I>) -> Result<()> {
        let Buffers { ids, stretch, heap, .. } = buffers;
        let len = |id: I| vocab.token(id.number()).map_or(0, <[u8]>::len);
        let (mut start, mut width, mut failed_at) = (0, WINDOW, 0);
        loop {
            let end = word.len().min(start + width);
            stretch.clear();
            if end - start <= WINDOW {
                self.merge_window(&word[start..end], stretch);
            } else {
                stretch.try_reserve(end - start).map_err(no_memory)?;
                self.merge_by_heap(&word[start..end], heap, stretch)?;
            }
            let fits = ids.last().is_none_or(|&last| splits.stay_apart(&self.pairs, last, stretch[0]));
            if fits && end == word.len() {
                ids.append(stretch);
                return Ok(());
            }
            if fits && stretch.len() > DOUBTFUL {
                stretch.truncate(stretch.len() - DOUBTFUL);
                start += stretch.iter().map(|&id| len(id)).sum::<usize>();
                ids.append(stretch);
                // Short of the joint that did not come out, the next one may bring this back to where it was.
                width = if start > failed_at { WINDOW } else { 2 * width };
                continue;
            }
            failed_at = if fits { failed_at } else { start };
            let back = start.saturating_sub(width / 2);
            while !fits
                && start > back
                && let Some(id) = ids.pop()
            {
                start -= len(id);
            }
            width *= 2;
            #[cfg(test)]
            {
                buffers.redone += 1;
            }
        }
    }

    /// Appends the ids of any bytes: a linked list of parts and a heap of (rank, place). An entry is stale when its
    /// place has another rank by now; dead places have [`Id::NONE`].
    fn merge_by_heap(&self, bytes: &[u8], heap: &mut Heap<I>, out: &mut Vec<I>) -> Result<()> {
        let Heap { ids, joins, next, previous, queue } = heap;
        let n = bytes.len();
        ids.clear();
        room_for(ids, n)?;
        ids.extend(bytes.iter().map(|&byte| self.byte_ids[usize::from(byte)]));
        joins.clear();
        room_for(joins, n)?;
        joins.extend(ids.windows(2).map(|w| self.pairs.get(w[0], w[1])));
        joins.push((I::NONE, I::default()));
        next.clear();
        room_for(next, n)?;
        next.extend(1..=n as u32);
        previous.clear();
        room_for(previous, n)?;
        previous.extend((0..n as u32).map(|i| i.wrapping_sub(1)));
        queue.clear();
        // A merge takes one entry out and puts two in at most.
        queue.try_reserve(2 * n).map_err(no_memory)?;
        queue.extend((0u32..).zip(&*joins).filter(|(_, j)| j.0 != I::NONE).map(|(at, j)| Reverse((j.0, at))));
        while let Some(Reverse((rank, place))) = queue.pop() {
            let at = place as usize;
            if joins[at].0 != rank {
                continue;
            }
            let gone = next[at] as usize;
            ids[at] = joins[at].1;
            next[at] = next[gone];
            joins[at] = (I::NONE, I::default());
            joins[gone] = (I::NONE, I::default());
            let mut join = |left: usize, right: usize| {
                joins[left] = self.pairs.get(ids[left], ids[right]);
                if joins[left].0 != I::NONE {
                    queue.push(Reverse((joins[left].0, left as u32)));
                }
            };
            let after = next[at] as usize;
            if after < n {
                previous[after] = place;
                join(at, after);
            }
            if at > 0 {
                join(previous[at] as usize, at);
            }
        }
        let mut at = 0;
        while at < n {
            out.push(ids[at]);
            at = next[at] as usize;
        }
        Ok(())
    }
}

fn room_for<T>(list: &mut Vec<T>, more: usize) -> Result<()> {
    list.try_reserve(more).map_err(no_memory)
}

impl<I: Id> Splits<I> {
    /// None where a token is made in two ways, or of one that is made later: then neighbours say nothing of the whole.
    fn new(vocab: &Vocab) -> Option<Self> {
        let byte = Split { left: I::default(), right: I::default(), made: 0 };
        let mut splits = vec![byte; vocab.len()];
        let mut ordered: Vec<_> = vocab.merges().iter().zip(dense_ranks(vocab)).collect();
        ordered.sort_by_key(|&(_, rank)| rank);
        for (merge, rank) in ordered {
            let (left, right) = merge.pair;
            let made = rank + 1;
            let is_made =
                |id: u32| vocab.token(id).is_some_and(|bytes| bytes.len() == 1) || splits[id as usize].made > 0;
            let before = |id: u32| is_made(id) && splits[id as usize].made < made;
            if splits[merge.id as usize].made > 0 || !before(left) || !before(right) {
                return None;
            }
            splits[merge.id as usize] = Split { left: I::of(left), right: I::of(right), made };
        }
        Some(Self(splits))
    }

    /// Whether the ids of two tokens' bytes are these two tokens.
    ///
    /// Backwards in time: what stands at the border, on either side, and which of both was made later. While both stood
    /// there, their pair must not have been due: before the left one was made, since of equal ranks the left place comes
    /// first, or not after the right one was.
    fn stay_apart(&self, pairs: &Pairs<I>, left: I, right: I) -> bool {
        let (mut left, mut right) = (left, right);
        // Pairs made before this were due.
        let mut until = u32::MAX;
        loop {
            let rank = pairs.rank(left, right);
            if rank != I::NONE && rank.number() + 1 < until {
                return false;
            }
            let (a, b) = (self.0[left.place()], self.0[right.place()]);
            if a.made > b.made {
                (left, until) = (a.right, a.made);
            } else if b.made > 0 {
                (right, until) = (b.left, b.made + 1);
            } else {
                return true;
            }
        }
    }
}

/// The ranks of the merges without gaps, in their order.
fn dense_ranks(vocab: &Vocab) -> Vec<u32> {
    let merges = vocab.merges();
    if (0..).zip(merges).all(|(n, merge)| merge.rank == n) {
        return (0..merges.len() as u32).collect();
    }
    let mut distinct: Vec<u32> = merges.iter().map(|merge| merge.rank).collect();
    distinct.sort_unstable();
    distinct.dedup();
    merges.iter().map(|merge| distinct.partition_point(|&rank| rank < merge.rank) as u32).collect()
}

/// Whether ids of two bytes hold a vocabulary's ids and ranks.
pub(super) fn are_narrow(vocab: &Vocab) -> bool {
    // One number is no id: it stands for a neighbour that is not there.
    vocab.len() < 1 << 16 && (vocab.merges().len() < 1 << 16 || dense_ranks(vocab).iter().all(|&rank| rank < 0xffff))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::naive;
    use crate::progress::Progress;
    use crate::train::{Options, TieBreak, train};
    use crate::vocab::Merge;
    use proptest::prelude::*;

    fn words() -> impl Strategy<Value = Vec<(Vec<u8>, u64)>> {
        prop::collection::vec(("[abc]{1,12}".prop_map(String::into_bytes), 1u64..20), 1..40)
    }

    fn trained(words: &[(Vec<u8>, u64)], merges: usize) -> Vocab {
        let options = Options::new(merges, TieBreak::Lexicographic);
        let merges = train(&words.iter().cloned().collect(), &options, &Progress::default()).unwrap();
        Vocab::from_training(merges, &[], "gpt2").unwrap()
    }

    fn ids_of<I: Id>(vocab: &Vocab, word: &[u8], level: Level) -> (Vec<u32>, usize) {
        let (core, mut buffers) = (Core::<I>::new(vocab, level), Buffers::default());
        core.merge(word, vocab, &mut buffers).unwrap();
        (buffers.ids.iter().map(|id| id.number()).collect(), buffers.redone)
    }

    proptest! {
        #[test]
        fn words_of_any_length_equal_the_specification(
            words in words(), merges in 0usize..60, text in "[abc]{0,400}|(ab|abc){0,90}|a{0,300}",
        ) {
            let vocab = trained(&words, merges);
            let expected = naive::encode(&vocab, text.as_bytes());
            for level in Level::ALL.into_iter().filter(|level| level.is_here()) {
                prop_assert_eq!(&ids_of::<u16>(&vocab, text.as_bytes(), level).0, &expected);
                prop_assert_eq!(&ids_of::<u32>(&vocab, text.as_bytes(), level).0, &expected);
            }
        }

        /// Merges in an order that no training has: of tokens that are made later, or in two ways, or never.
        #[test]
        fn merges_in_any_order_equal_the_specification(
            words in words(), merges in 1usize..40, order in prop::collection::vec(any::<u32>(), 40), again in 0usize..4,
            text in "[abc]{0,300}",
        ) {
            let vocab = trained(&words, merges);
            let tokens: Vec<_> = (0..vocab.len() as u32).map(|id| (vocab.token(id).unwrap().to_vec(), id)).collect();
            let mut rules: Vec<Merge> = vocab.merges().to_vec();
            // Other ways to the same tokens.
            for n in 0..again.min(rules.len()) {
                let bytes = vocab.token(rules[n].id).unwrap();
                for cut in 1..bytes.len() {
                    if let (Some(a), Some(b)) = (vocab.id_of(&bytes[..cut]), vocab.id_of(&bytes[cut..])) {
                        rules.push(Merge { pair: (a, b), ..rules[n] });
                    }
                }
            }
            let mut numbered: Vec<_> = rules.into_iter().zip(order.iter().cycle()).collect();
            numbered.sort_by_key(|&(_, n)| n);
            let rules = (0..).zip(numbered).map(|(rank, (rule, _))| Merge { rank, ..rule }).collect();
            let vocab = Vocab::new(&tokens, rules, vec![], "gpt2", false).unwrap();
            let expected = naive::encode(&vocab, text.as_bytes());
            prop_assert_eq!(&ids_of::<u16>(&vocab, text.as_bytes(), Level::Scalar).0, &expected);
            prop_assert_eq!(&ids_of::<u32>(&vocab, text.as_bytes(), Level::Scalar).0, &expected);
        }
    }

    #[test]
    fn stretches_are_seldom_merged_twice() {
        let mut state = 1u64;
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize
        };
        let words: Vec<_> =
            (0..3000).map(|n| ((0..3 + n % 9).map(|_| b"abcdefgh"[random() % 8]).collect(), 3)).collect();
        let vocab = trained(&words, 2000);
        for text in [
            (0..100_000).map(|_| b"abcdefgh"[random() % 8]).collect::<Vec<_>>(),
            vec![b'a'; 100_000],
            b"abcabcdabcde".repeat(9_000),
        ] {
            let (ids, redone) = ids_of::<u16>(&vocab, &text, Level::Scalar);
            assert!(ids.len() > 100 && redone < text.len() / 64 / 5, "{redone} of {}", text.len() / 64);
        }
    }

    #[test]
    fn tokens_longer_than_a_window() {
        let words = vec![(vec![b'-'; 256], 9), (b"-+".repeat(100), 7)];
        let vocab = trained(&words, 20);
        assert!((0..vocab.len() as u32).any(|id| vocab.token(id).unwrap().len() > WINDOW));
        for text in [vec![b'-'; 1000], b"-+".repeat(300), [vec![b'-'; 333], b"+-".repeat(200)].concat()] {
            assert_eq!(ids_of::<u16>(&vocab, &text, Level::Scalar).0, naive::encode(&vocab, &text));
        }
    }
}
