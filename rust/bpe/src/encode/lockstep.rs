//! New words, many at a time: while one waits for memory the others go on.
//!
//! A merge needs the ranks of two new pairs, each somewhere in a table that the first cache does not hold, and the next
//! merge needs them. So every round gives each word one merge: it takes what it asked for in the round before, and asks
//! for what it will need in the next. In: packed words. Out: their ids. Called by `words`.

use bytekiln_simd::Level;

use super::ids::Id;
use super::merge::Core;
use crate::packed::packed_len;

/// Places of a packed word's bytes, and of one more.
pub(super) const PLACES: usize = 16;
/// Words that are merged together.
pub(super) const TOGETHER: usize = 64;

/// A word that is being merged.
#[derive(Debug, Clone, Copy)]
pub(super) struct Miss<I> {
    /// The word.
    pub(super) key: u128,
    /// Its ids at the end, [`Self::len`] of them.
    pub(super) ids: [I; PLACES],
    ranks: [I; PLACES],
    /// A bit for each place where a part begins.
    parts: u16,
    /// Places whose rank was asked for, and where it is found; [`NOWHERE`].
    asked: [(u8, u32); 2],
}

const NOWHERE: (u8, u32) = (u8::MAX, 0);

impl<I: Id> Miss<I> {
    /// Number of ids.
    pub(super) fn len(&self) -> usize {
        self.parts.count_ones() as usize
    }
}

impl<I: Id> Core<I> {
    /// A word as bytes.
    pub(super) fn begin(&self, key: u128) -> Miss<I> {
        let (bytes, len) = (key.to_le_bytes(), packed_len(key));
        let (mut ids, mut ranks) = ([I::default(); PLACES], [I::NONE; PLACES]);
        for (id, &byte) in ids.iter_mut().zip(&bytes[..len]) {
            *id = self.byte_ids[usize::from(byte)];
        }
        for (rank, pair) in ranks.iter_mut().zip(bytes[..len].windows(2)) {
            *rank = self.byte_ranks[usize::from(pair[0]) << 8 | usize::from(pair[1])];
        }
        Miss { key, ids, ranks, parts: (1u16 << len) - 1, asked: [NOWHERE; 2] }
    }

    /// Merges words to their ends.
    pub(super) fn finish(&self, misses: &mut [Miss<I>]) {
        match self.level {
            // SAFETY: the level says that the processor has the instructions.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code, reason = "vector instructions; held to the plain loop by a property test")]
            Level::Avx2 | Level::Avx512 | Level::Avx512Vbmi2 => unsafe { self.finish_avx2(misses) },
            _ => self.finish_by(misses),
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt")]
    fn finish_avx2(&self, misses: &mut [Miss<I>]) {
        self.finish_by(misses);
    }

    #[inline(always)]
    #[allow(clippy::inline_always, reason = "compiled once for each set of instructions")]
    fn finish_by(&self, misses: &mut [Miss<I>]) {
        // Numbers of those that are not at their end.
        let mut left = [0u8; TOGETHER];
        debug_assert!(misses.len() <= TOGETHER);
        for (n, number) in (0..).zip(&mut left) {
            *number = n;
        }
        let mut count = misses.len().min(TOGETHER);
        while count > 0 {
            let mut kept = 0;
            for n in 0..count {
                let number = left[n];
                if self.one_round(&mut misses[usize::from(number)]) {
                    left[kept] = number;
                    kept += 1;
                }
            }
            count = kept;
        }
        for miss in misses {
            let (mut to, mut parts) = (0, miss.parts);
            while parts != 0 {
                miss.ids[to] = miss.ids[parts.trailing_zeros() as usize & (PLACES - 1)];
                to += 1;
                parts &= parts - 1;
            }
        }
    }

    /// One merge, if there is one; asks for what the next one needs.
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "compiled once for each set of instructions")]
    fn one_round(&self, miss: &mut Miss<I>) -> bool {
        let Miss { ids, ranks, parts, asked, .. } = miss;
        let behind = |parts: u16, at: usize| parts & (u16::MAX << at << 1);
        for &(at, slot) in &*asked {
            if at != NOWHERE.0 {
                let at = usize::from(at) & (PLACES - 1);
                let next = behind(*parts, at).trailing_zeros() as usize & (PLACES - 1);
                ranks[at] = self.pairs.rank_at(slot, ids[at], ids[next]);
            }
        }
        let (rank, at) = I::lowest_of_few(ranks);
        if rank == I::NONE {
            return false;
        }
        let at = at & (PLACES - 1);
        let gone = behind(*parts, at).trailing_zeros() as usize & (PLACES - 1);
        *parts &= !(1 << gone);
        ids[at] = self.results[rank.place()];
        (ranks[at], ranks[gone], *asked) = (I::NONE, I::NONE, [NOWHERE; 2]);
        let (after, before) = (behind(*parts, at), *parts & !(u16::MAX << at));
        if after != 0 {
            let next = after.trailing_zeros() as usize & (PLACES - 1);
            asked[0] = (at as u8, self.pairs.ask(ids[at], ids[next]));
        }
        if before != 0 {
            let previous = 15 - before.leading_zeros() as usize;
            ranks[previous] = I::NONE;
            asked[1] = (previous as u8, self.pairs.ask(ids[previous], ids[at]));
        }
        true
    }
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
                let mut misses: Vec<_> = together.iter().map(|w| core.begin(pack(w.as_bytes()).unwrap())).collect();
                core.finish(&mut misses);
                for (miss, word) in misses.iter().zip(together) {
                    let ids: Vec<_> = miss.ids[..miss.len()].iter().map(|id| id.number()).collect();
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
