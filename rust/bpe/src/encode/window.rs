//! Words of up to 64 bytes, some at a time: all ranks in vector registers, all places of the lowest merged at once.
//!
//! In: bytes. Out: their ids. Called by `merge` for the windows of longer words, one by one, and by `words` for words that are
//! too long for a key: many windows are merged together, a round each, so that what one waits for (the table of pairs, and
//! ranks that were stored a moment ago) another one's work hides.

use std::hint::select_unpredictable;

use super::ids::Id;
use super::merge::Core;

/// Bytes of a window.
pub(super) const WINDOW: usize = 64;

/// Windows that are merged together.
pub(super) const WINDOWS: usize = 32;

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
        for windows in windows.chunks_mut(WINDOWS) {
            // Numbers of those that are not at their end.
            let mut left: [u8; WINDOWS] = std::array::from_fn(|n| n as u8);
            let mut count = windows.len();
            while count > 0 {
                let mut kept = 0;
                for n in 0..count {
                    let number = left[n];
                    left[kept] = number;
                    kept += usize::from(self.merge_lowest(&mut windows[usize::from(number)]));
                }
                count = kept;
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
            let before = *parts & !(u64::MAX << at);
            *parts &= !(1 << gone);
            places &= !(1 << at | 1 << gone);
            // Without a branch: whether there is a neighbour, and whether it merges, no processor can foretell. Where there is
            // none, the place itself stands for it.
            let next = select_unpredictable(behind == 0, at, behind.trailing_zeros() as usize % WINDOW);
            let previous = select_unpredictable(before == 0, at, 63 - before.leading_zeros() as usize % WINDOW);
            let with_next = self.pairs.rank(result, ids[next]);
            let with_previous = self.pairs.rank(ids[previous], result);
            let with_next = select_unpredictable(behind == 0, I::NONE, with_next);
            ids[at] = result;
            ranks[gone] = I::NONE;
            // The former goes over the latter where there is no other place for it.
            ranks[previous] = with_previous;
            ranks[at] = with_next;
            if with_next <= lowest || before != 0 && with_previous <= lowest {
                break;
            }
        }
        true
    }
}
