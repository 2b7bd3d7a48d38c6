//! Words of up to 64 bytes, some at a time: all ranks in vector registers, all places of the lowest merged at once.
//!
//! In: bytes. Out: their ids. Called by `merge` for the windows of longer words, one by one, and by `words` for words that are
//! too long for a key: many windows are merged together, a round each, so that what one waits for (the table of pairs, and
//! ranks that were stored a moment ago) another one's work hides.

use super::ids::Id;
use super::merge::Core;

/// Bytes of a window.
pub(super) const WINDOW: usize = 64;

/// A word that is being merged.
#[derive(Debug, Clone, Copy)]
pub(super) struct Window<I> {
    ids: [I; WINDOW],
    /// Of each id with the next one, where a part begins.
    ranks: [I; WINDOW],
    /// A bit for each place where a part begins.
    parts: u64,
}

impl<I: Id> Window<I> {
    /// The ids, once it is merged.
    pub(super) fn ids(&self) -> impl Iterator<Item = I> {
        let mut parts = self.parts;
        std::iter::from_fn(move || {
            let id = (parts != 0).then(|| self.ids[parts.trailing_zeros() as usize % WINDOW]);
            parts &= parts.wrapping_sub(1);
            id
        })
    }
}

impl<I: Id> Core<I> {
    /// At most [`WINDOW`] bytes.
    pub(super) fn open(&self, bytes: &[u8]) -> Window<I> {
        let (mut ids, mut ranks) = ([I::default(); WINDOW], [I::NONE; WINDOW]);
        for (id, &byte) in ids.iter_mut().zip(bytes) {
            *id = self.byte_ids[usize::from(byte)];
        }
        for (rank, pair) in ranks.iter_mut().zip(bytes.windows(2)) {
            *rank = self.byte_ranks[usize::from(pair[0]) << 8 | usize::from(pair[1])];
        }
        Window { ids, ranks, parts: u64::MAX.checked_shr((WINDOW - bytes.len()) as u32).unwrap_or(0) }
    }

    /// Merges windows to their ends.
    pub(super) fn merge_windows(&self, windows: &mut [Window<I>]) {
        let mut go_on = true;
        while go_on {
            go_on = false;
            for window in &mut *windows {
                go_on |= self.merge_lowest(window);
            }
        }
    }

    /// Merges the places of the lowest rank from left to right; `false` if there are none.
    ///
    /// Should a pair that this makes have no higher rank, which it has not where tokens are made before they are merged, the
    /// search begins anew.
    #[inline]
    fn merge_lowest(&self, window: &mut Window<I>) -> bool {
        let Window { ids, ranks, parts, .. } = window;
        let (lowest, mut places) = I::lowest(ranks, self.level);
        if lowest == I::NONE {
            return false;
        }
        let result = self.result(lowest);
        while places != 0 {
            let at = places.trailing_zeros() as usize % WINDOW;
            let behind = *parts & (u64::MAX << at << 1);
            let gone = behind.trailing_zeros() as usize % WINDOW;
            let behind = behind & behind.wrapping_sub(1);
            *parts &= !(1 << gone);
            places &= !(1 << at | 1 << gone);
            ids[at] = result;
            (ranks[gone], ranks[at]) = (I::NONE, I::NONE);
            let mut anew = false;
            if behind != 0 {
                let next = behind.trailing_zeros() as usize % WINDOW;
                ranks[at] = self.pairs.rank(result, ids[next]);
                anew = ranks[at] <= lowest;
            }
            let before = *parts & !(u64::MAX << at);
            if before != 0 {
                let previous = 63 - before.leading_zeros() as usize;
                ranks[previous] = self.pairs.rank(ids[previous], result);
                anew |= ranks[previous] <= lowest;
            }
            if anew {
                break;
            }
        }
        true
    }
}
