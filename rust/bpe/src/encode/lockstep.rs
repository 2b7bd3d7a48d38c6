//! New words, many at a time: while one waits for memory the others go on.
//!
//! A merge needs the ranks of two new pairs, each somewhere in a table that the first cache does not hold, and the next
//! merge needs them. So every round gives each word one merge: it takes what it asked for in the round before, and asks
//! for what it will need in the next. In: packed words. Out: their ids. Called by `words`.

use bytekiln_simd::Level;

use super::ids::Id;
use super::merge::Core;
use super::table::Place;
use crate::packed::packed_len;

/// Places of a packed word's bytes, and of one more.
pub(super) const PLACES: usize = 16;
/// Words that are merged together.
pub(super) const TOGETHER: usize = 64;

/// Room for ids and ranks: one more than [`PLACES`] can be read behind each of them, and all that is behind is [`Id::NONE`].
pub(super) const ROOM: usize = 2 * PLACES;

/// A word that is being merged.
#[derive(Debug, Clone, Copy)]
pub(super) struct Miss<I: Id> {
    /// The word, and where its ids belong.
    pub(super) key: u128,
    pub(super) place: Place,
    /// Number of ids.
    len: u32,
    /// Place 0 is nobody's, so that the first id has something before it.
    ids: [I; ROOM],
    /// Of each id with the next one.
    ranks: [I; ROOM],
    /// What the last merge made, with what is before and behind it.
    at: u32,
    pairs: [I::Pair; 2],
    slots: [u32; 2],
}

impl<I: Id> Miss<I> {
    /// The ids, once it is merged.
    #[inline]
    pub(super) fn ids(&self) -> &[I] {
        &self.ids[1..=self.len as usize]
    }

    /// Of a word at its end: this id instead.
    pub(super) fn replace(&mut self, id: I) {
        (self.ids[1], self.len) = (id, 1);
    }
}

impl<I: Id> Core<I> {
    /// A word as bytes.
    pub(super) fn begin(&self, key: u128, place: Place) -> Miss<I> {
        let (bytes, len) = (key.to_le_bytes(), packed_len(key));
        let (mut ids, mut ranks) = ([I::NONE; ROOM], [I::NONE; ROOM]);
        // All places, whatever the length: those behind it are made good below.
        for at in 0..PLACES - 1 {
            let (byte, next) = (usize::from(bytes[at]), usize::from(bytes[at + 1]));
            ids[at + 1] = self.byte_ids[byte];
            ranks[at + 1] = self.byte_ranks[byte << 8 | next];
        }
        let len = len.clamp(1, PLACES - 1);
        ids[len + 1..len + PLACES].fill(I::NONE);
        ranks[len..len + PLACES].fill(I::NONE);
        // Nothing was asked for yet: the pair of nobody and nobody has no rank, and place 0 no other.
        let nobody = [I::pair(I::NONE, I::NONE); 2];
        Miss { key, place, len: len as u32, ids, ranks, at: ROOM as u32 - 1, pairs: nobody, slots: [0; 2] }
    }

    /// Merges words to their ends.
    pub(super) fn finish(&self, misses: &mut [Miss<I>]) {
        match self.level {
            // SAFETY: the level says that the processor has the instructions.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code, reason = "vector instructions; held to the specification by a property test")]
            Level::Avx2 | Level::Avx512 => unsafe { self.finish_avx2(misses) },
            // SAFETY: the same.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code, reason = "the same")]
            Level::Avx512Vbmi2 => unsafe { self.finish_avx512(misses) },
            _ => self.finish_by(misses),
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt")]
    fn finish_avx2(&self, misses: &mut [Miss<I>]) {
        self.finish_by(misses);
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,avx2,bmi1,bmi2,lzcnt,popcnt")]
    fn finish_avx512(&self, misses: &mut [Miss<I>]) {
        let (mut left, mut count) = all_of(misses);
        while count > 0 {
            // SAFETY: the instructions are those of this function.
            #[allow(unsafe_code, reason = "vector instructions; held to the specification by a property test")]
            let round = |number: usize| unsafe { self.round_in_registers(&mut misses[number]) };
            count = keep(&mut left, count, round);
        }
    }

    #[inline(always)]
    #[allow(clippy::inline_always, reason = "compiled once for each set of instructions")]
    fn finish_by(&self, misses: &mut [Miss<I>]) {
        let (mut left, mut count) = all_of(misses);
        while count > 0 {
            // All ranks are stored before the first of them is read: many at a time from places that were written one by
            // one a moment ago would wait until they are in the cache.
            for &number in &left[..count] {
                self.take_asked(&mut misses[usize::from(number)]);
            }
            count = keep(&mut left, count, |number| self.one_round(&mut misses[number]));
        }
    }

    /// Takes the ranks that the last merge asked for, then as [`Self::one_round`].
    ///
    /// # Safety
    /// The processor has AVX-512 with VBMI 2 and VL.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    #[allow(unsafe_code, reason = "vector instructions; held to the specification by a property test")]
    #[allow(clippy::inline_always, reason = "takes on the instructions of whoever calls it")]
    unsafe fn round_in_registers(&self, miss: &mut Miss<I>) -> bool {
        let Miss { len, ids, ranks, at: merged, pairs, slots, .. } = miss;
        // SAFETY: the caller's.
        unsafe {
            // At first there is no such place.
            let place = 1u32 << (*merged % 32);
            let row = I::with(I::load(ranks), place >> 1, self.pairs.rank_at(slots[0], pairs[0]));
            let row = I::with(row, place, self.pairs.rank_at(slots[1], pairs[1]));
            let (rank, at) = I::lowest_in(row);
            if rank == I::NONE {
                return false;
            }
            let at = at % PLACES;
            let (id, place) = (self.result(rank), 1u32 << at);
            let (left, right) = (I::pair(ids[at.saturating_sub(1)], id), I::pair(id, ids[at + 2]));
            I::store(I::without(row, place << 1), ranks);
            I::store(I::without(I::with(I::load(ids), place, id), place << 1), ids);
            *len -= 1;
            (*merged, *pairs, *slots) = (at as u32, [left, right], [self.pairs.ask(left), self.pairs.ask(right)]);
        }
        true
    }

    /// Takes the ranks that the last merge asked for.
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "compiled once for each set of instructions")]
    fn take_asked(&self, miss: &mut Miss<I>) {
        let Miss { ranks, at, pairs, slots, .. } = miss;
        let at = *at as usize % ROOM;
        ranks[at.saturating_sub(1)] = self.pairs.rank_at(slots[0], pairs[0]);
        ranks[at] = self.pairs.rank_at(slots[1], pairs[1]);
    }

    /// One merge, if there is one; asks for what the next one needs.
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "compiled once for each set of instructions")]
    fn one_round(&self, miss: &mut Miss<I>) -> bool {
        let Miss { len, ids, ranks, at: merged, pairs, slots, .. } = miss;
        let (rank, at) = I::lowest_of_few(ranks.first_chunk().unwrap_or(&[I::NONE; PLACES]));
        if rank == I::NONE {
            return false;
        }
        let at = at % PLACES;
        let id = self.result(rank);
        let (before, behind) = (ids[at.saturating_sub(1)], ids[at + 2]);
        // What is behind moves up: a register, loaded and stored.
        for row in [&mut *ids, &mut *ranks] {
            let mut behind = [I::NONE; PLACES - 2];
            behind.copy_from_slice(&row[at + 2..at + PLACES]);
            row[at + 1..at + PLACES - 1].copy_from_slice(&behind);
        }
        ids[at] = id;
        *len -= 1;
        let (left, right) = (I::pair(before, id), I::pair(id, behind));
        // Asked for before they are stored: what was stored in two parts a moment ago takes long to load as one.
        let asked = [self.pairs.ask(left), self.pairs.ask(right)];
        (*merged, *pairs, *slots) = (at as u32, [left, right], asked);
        true
    }
}

/// Numbers of those that are not at their end, and how many: all of them.
fn all_of<I: Id>(misses: &[Miss<I>]) -> ([u8; TOGETHER], usize) {
    debug_assert!(misses.len() <= TOGETHER);
    (std::array::from_fn(|n| n as u8), misses.len().min(TOGETHER))
}

/// Gives each a round, and keeps those that had a merge in it.
#[inline(always)]
#[allow(clippy::inline_always, reason = "compiled once for each set of instructions")]
fn keep(left: &mut [u8; TOGETHER], count: usize, mut round: impl FnMut(usize) -> bool) -> usize {
    let mut kept = 0;
    for n in 0..count {
        let number = left[n];
        left[kept] = number;
        kept += usize::from(round(usize::from(number)));
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::naive;
    use crate::packed::pack;
    use crate::progress::Progress;
    use crate::train::{Options, TieBreak, train};
    use crate::vocab::Vocab;
    use proptest::prelude::*;

    fn holds<I: Id>(vocab: &Vocab, words: &[String]) {
        for level in Level::ALL.into_iter().filter(|level| level.is_here()) {
            let core = Core::<I>::new(vocab, level);
            for together in words.chunks(TOGETHER) {
                let mut misses: Vec<_> =
                    together.iter().map(|w| core.begin(pack(w.as_bytes()).unwrap(), Place::default())).collect();
                core.finish(&mut misses);
                for (miss, word) in misses.iter().zip(together) {
                    let ids: Vec<_> = miss.ids().iter().map(|id| id.number()).collect();
                    assert_eq!(ids, naive::encode(vocab, word.as_bytes()), "{word} at {}", level.name());
                }
            }
        }
    }

    proptest! {
        #[test]
        fn words_merged_together_equal_the_specification(
            learnt in prop::collection::vec(("[abc]{1,12}".prop_map(String::into_bytes), 1u64..20), 1..40),
            merges in 0usize..80,
            words in prop::collection::vec("[abc]{1,15}", 1..150),
        ) {
            let options = Options::new(merges, TieBreak::Lexicographic);
            let merges = train(&learnt.into_iter().collect(), &options, &Progress::default()).unwrap();
            let vocab = Vocab::from_training(merges, &[], "gpt2").unwrap();
            holds::<u16>(&vocab, &words);
            holds::<u32>(&vocab, &words);
        }
    }
}
