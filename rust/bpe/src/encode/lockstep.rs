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
    asked: [Asked<I>; 2],
}

/// A pair whose rank was asked for.
#[derive(Debug, Clone, Copy)]
struct Asked<I> {
    /// Where the rank belongs.
    at: u8,
    /// Where it is found, if the pair merges.
    slot: u32,
    left: I,
    right: I,
}

/// A place that no word of at most 15 bytes has: ranks of neighbours that are not there go to it. What each round does
/// is the same for every word then, and no branch of it is foretold wrongly.
const NO_PLACE: u8 = PLACES as u8 - 1;

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
        let (mut ids, mut ranks) = ([I::NONE; PLACES], [I::NONE; PLACES]);
        // All places, whatever the length.
        for at in 0..PLACES - 1 {
            let (byte, next) = (usize::from(bytes[at]), usize::from(bytes[at + 1]));
            let rank = self.byte_ranks[byte << 8 | next];
            ids[at] = self.byte_ids[byte];
            ranks[at] = if at + 1 < len { rank } else { I::NONE };
        }
        let nothing = Asked { at: NO_PLACE, slot: 0, left: I::NONE, right: I::NONE };
        Miss { key, ids, ranks, parts: (1u16 << len) - 1, asked: [nothing; 2] }
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
            // All ranks are stored before the first of them is read: many at a time from places that were written one by
            // one a moment ago would wait until they are in the cache.
            for &number in &left[..count] {
                self.take_asked(&mut misses[usize::from(number)]);
            }
            let mut kept = 0;
            for n in 0..count {
                let number = left[n];
                left[kept] = number;
                kept += usize::from(self.one_round(&mut misses[usize::from(number)]));
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

    /// Takes the ranks that the last merge asked for.
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "compiled once for each set of instructions")]
    fn take_asked(&self, miss: &mut Miss<I>) {
        for asked in miss.asked {
            let rank = self.pairs.rank_at(asked.slot, asked.left, asked.right);
            miss.ranks[usize::from(asked.at) & (PLACES - 1)] = rank;
        }
    }

    /// One merge, if there is one; asks for what the next one needs.
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "compiled once for each set of instructions")]
    fn one_round(&self, miss: &mut Miss<I>) -> bool {
        let Miss { ids, ranks, parts, asked, .. } = miss;
        let (rank, at) = I::lowest_of_few(ranks);
        if rank == I::NONE {
            return false;
        }
        let at = at & (PLACES - 1);
        let behind = *parts & (u16::MAX << at << 1);
        let gone = behind.trailing_zeros() as usize & (PLACES - 1);
        let (behind, before) = (behind & behind.wrapping_sub(1), *parts & !(u16::MAX << at));
        *parts &= !(1 << gone);
        let id = self.results[rank.place()];
        ids[at] = id;
        (ranks[at], ranks[gone]) = (I::NONE, I::NONE);
        // Of no parts the last place, which has no id.
        let next = behind.trailing_zeros().min(u32::from(NO_PLACE)) as usize;
        let previous = 15 - if before == 0 { 0 } else { before.leading_zeros() as usize };
        let (left, right) = (ids[previous & (PLACES - 1)], ids[next & (PLACES - 1)]);
        ranks[previous & (PLACES - 1)] = I::NONE;
        *asked = [
            Asked { at: at as u8, slot: self.pairs.ask(id, right), left: id, right },
            Asked { at: previous as u8, slot: self.pairs.ask(left, id), left, right: id },
        ];
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
