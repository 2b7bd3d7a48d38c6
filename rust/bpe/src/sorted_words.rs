//! Counted words in the order of their bytes, one after another.
//!
//! In: packed words and longer ones. Out: [`SortedWords`], which `counts` writes and merges. Called by `word_counts`.

use std::cmp::Ordering;

use crate::error::Result;
use crate::progress::Progress;

/// Words that are sorted between two looks at whether to stop: some milliseconds.
const SORTED_AT_ONCE: usize = if cfg!(test) { 1 << 4 } else { 1 << 17 };
/// Words of which the middle one parts a list that is longer.
const SAMPLE: usize = 15;

/// Counted words in the order of their bytes.
pub(crate) struct SortedWords {
    short: std::vec::IntoIter<(u128, u64)>,
    long: std::vec::IntoIter<(Box<[u8]>, u64)>,
    /// The next short word, which was compared with the next long one.
    next: Option<([u8; 16], u64)>,
    now: Option<(Word, u64)>,
}

/// A packed word, or a longer one.
enum Word {
    Short([u8; 16]),
    Long(Box<[u8]>),
}

impl SortedWords {
    /// Words, packed and longer ones, in any order.
    ///
    /// # Errors
    /// [`Error::Interrupted`](crate::error::Error::Interrupted) when `progress` says so, looked at every few milliseconds.
    pub(crate) fn of(
        mut short: Vec<(u128, u64)>,
        mut long: Vec<(Box<[u8]>, u64)>,
        progress: &Progress,
    ) -> Result<Self> {
        // The first byte of a word is the lowest one of its key, its length the highest: swapped, words compare as
        // their bytes do, and of two that differ in zero bytes at the end the shorter comes first.
        sort(&mut short, |a, b| a.0.swap_bytes().cmp(&b.0.swap_bytes()), progress)?;
        sort(&mut long, Ord::cmp, progress)?;
        Ok(Self { short: short.into_iter(), long: long.into_iter(), next: None, now: None })
    }

    /// Goes to the next word; `false` behind the last.
    pub(crate) fn next(&mut self) -> bool {
        if self.next.is_none() {
            self.next = self.short.next().map(|(key, count)| (key.to_le_bytes(), count));
        }
        let long = self.long.as_slice().first();
        let short_first = match (&self.next, long) {
            (Some((short, _)), Some((long, _))) => short_word(short) < &**long,
            (short, _) => short.is_some(),
        };
        self.now = if short_first {
            self.next.take().map(|(word, count)| (Word::Short(word), count))
        } else {
            self.long.next().map(|(word, count)| (Word::Long(word), count))
        };
        self.now.is_some()
    }

    /// The word.
    pub(crate) fn word(&self) -> &[u8] {
        match &self.now {
            Some((Word::Short(short), _)) => short_word(short),
            Some((Word::Long(long), _)) => long,
            None => &[],
        }
    }

    /// How often it occurs.
    pub(crate) fn count(&self) -> u64 {
        self.now.as_ref().map_or(0, |now| now.1)
    }
}

/// Sorts, and looks at whether to stop between parts that are sorted at once.
fn sort<T>(items: &mut [T], order: impl Fn(&T, &T) -> Ordering, progress: &Progress) -> Result<()> {
    let mut parts = vec![items];
    while let Some(part) = parts.pop() {
        progress.check()?;
        if part.len() <= SORTED_AT_ONCE {
            part.sort_unstable_by(&order);
            continue;
        }
        let mut sample: Vec<_> = (0..SAMPLE).map(|n| part.len() / SAMPLE * n).collect();
        sample.sort_unstable_by(|&a, &b| order(&part[a], &part[b]));
        part.swap(0, sample[SAMPLE / 2]);
        let Some((pivot, rest)) = part.split_first_mut() else { continue };
        let (mut low, mut high, mut swaps) = (0, rest.len(), 0);
        loop {
            while low < high && order(&rest[low], pivot).is_lt() {
                low += 1;
            }
            while low < high && order(&rest[high - 1], pivot).is_ge() {
                high -= 1;
            }
            if low == high {
                break;
            }
            rest.swap(low, high - 1);
            (low, high, swaps) = (low + 1, high - 1, swaps + 1);
            if swaps % SORTED_AT_ONCE == 0 {
                progress.check()?;
            }
        }
        // The pivot is in its place, and in no part.
        part.swap(0, low);
        let (left, right) = part.split_at_mut(low);
        parts.push(left);
        parts.extend(right.get_mut(1..));
    }
    Ok(())
}

fn short_word(bytes: &[u8; 16]) -> &[u8] {
    &bytes[..usize::from(bytes[15])]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn sorting_looks_at_whether_to_stop() {
        let progress = Progress::default();
        progress.stop();
        assert!(matches!(sort(&mut [3, 1, 2], Ord::cmp, &progress), Err(Error::Interrupted)));
        // Equal items, and such as come in order already.
        for mut items in [vec![7; 1000], (0..1000).collect(), (0..1000).rev().collect::<Vec<_>>()] {
            let mut expected = items.clone();
            expected.sort_unstable();
            sort(&mut items, Ord::cmp, &Progress::default()).unwrap();
            assert_eq!(items, expected);
        }
    }
}
