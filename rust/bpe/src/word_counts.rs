//! A table of words and how often each occurs.
//!
//! In: words, one by one or as the ends of those of a text. Out: [`WordCounts`], u64 counts that can be added to others, and
//! read in some order (`reading`). Filled by `count`, kept by `counts`.

mod reading;

use std::collections::HashMap;

use bytekiln_simd::Level;
use foldhash::fast::FixedState;

use crate::error::{Error, Result};
use crate::hash::{self, prefetch};
use crate::packed::{Hasher, Keys, PACKED, pack};
use crate::pages;
use crate::pretokenize::Ends;
use crate::progress::{Progress, Stop};

/// Slots that are touched between two looks at whether to stop.
const TOUCHED_AT_ONCE: usize = 1 << 19;
/// Words whose slots are asked for together.
const BATCH: usize = 512;

/// How often each pre-token occurs. Memory grows with the number of distinct ones.
#[derive(Debug, Clone)]
pub struct WordCounts {
    /// Open addressing, linear probing, at most five eighths full; key 0 is a free slot.
    slots: Vec<(u128, u64)>,
    used: usize,
    /// Words counted, for whoever watches.
    seen: u64,
    long: HashMap<Box<[u8]>, u64, FixedState>,
    /// Bytes of the words in `long`.
    long_bytes: usize,
    hasher: Hasher,
    /// Says, while a job counts or joins, that nobody wants the counts any more: growing to gigabytes, which takes a
    /// second, is given up then.
    stop: Option<Stop>,
    given_up: bool,
    /// Words whose slots have been asked for.
    waiting: Box<Keys<BATCH, SLOT>>,
}

impl Default for WordCounts {
    fn default() -> Self {
        let (long, waiting) = (HashMap::with_hasher(hash::state()), Box::default());
        // A level that is none is refused before anything is counted (`pretokenize`).
        let hasher = Hasher::new(Level::of_process().unwrap_or(Level::Scalar), hash::seed() as u32);
        let slots = vec![(0, 0); 1 << 12];
        Self { slots, used: 0, seen: 0, long, long_bytes: 0, hasher, stop: None, given_up: false, waiting }
    }
}

impl WordCounts {
    /// An empty table that stops growing when `progress` says so: then [`Self::whole`] fails.
    pub(crate) fn stopped_by(progress: &Progress) -> Self {
        Self { stop: Some(progress.stop_flag()), ..Self::default() }
    }

    /// Its job is over, which has no say in what is added from now on.
    pub(crate) fn released(self) -> Self {
        Self { stop: None, ..self }
    }

    /// Fails where words are missing.
    ///
    /// # Errors
    /// [`Error::Interrupted`].
    pub(crate) fn whole(&self) -> Result<()> {
        if self.given_up { Err(Error::Interrupted) } else { Ok(()) }
    }

    /// Words counted, repeats included, for whoever watches.
    pub(crate) fn seen(&self) -> u64 {
        self.seen
    }

    /// Counts one more `word`.
    pub fn add(&mut self, word: &[u8]) {
        self.add_many(word, 1);
    }

    /// Counts `word` another `count` times. Sums stop at `u64::MAX`, for which [`Self::total`] is an error.
    pub fn add_many(&mut self, word: &[u8], count: u64) {
        self.seen = self.seen.saturating_add(count);
        match pack(word) {
            Some(key) => self.add_packed(key, count),
            None if word.is_empty() => {}
            None => {
                if let Some(n) = self.long.get_mut(word) {
                    *n = n.saturating_add(count);
                } else {
                    self.long_bytes += word.len();
                    self.long.insert(word.into(), count);
                }
            }
        }
    }

    fn add_packed(&mut self, key: u128, count: u64) {
        self.add_at(key, self.hasher.place(key, self.slots.len()), count);
    }

    #[inline]
    fn add_at(&mut self, key: u128, mut at: usize, count: u64) {
        let mask = self.slots.len() - 1;
        loop {
            let slot = &mut self.slots[at];
            if slot.0 == key {
                slot.1 = slot.1.saturating_add(count);
                return;
            }
            if slot.0 == 0 {
                if self.given_up {
                    return;
                }
                *slot = (key, count);
                break;
            }
            at = (at + 1) & mask;
        }
        self.used += 1;
        if self.used * 8 > self.slots.len() * 5 {
            self.grow();
        }
    }

    /// Counts words of `text`.
    ///
    /// The slots of a batch are asked for before the first of them is looked at: the table is larger than the caches,
    /// and so the waits overlap.
    pub(crate) fn add_run(&mut self, text: &[u8], ends: &Ends<'_>) {
        let mut start = ends.start;
        let mut long = Vec::new();
        for offsets in ends.offsets.chunks(BATCH) {
            self.make_room(offsets.len());
            if self.given_up {
                return;
            }
            let Self { slots, used, waiting, hasher, .. } = self;
            let end = hasher.keys::<true, _, _, _>(text, &Ends { start, offsets, ..*ends }, slots, waiting);
            let mask = slots.len() - 1;
            for (n, (&key, &place)) in waiting.keys.iter().zip(&waiting.places).take(offsets.len()).enumerate() {
                if key == 0 {
                    long.push(n);
                    continue;
                }
                let mut at = place as usize;
                loop {
                    let slot = &mut slots[at & mask];
                    if slot.0 == key {
                        slot.1 = slot.1.saturating_add(1);
                        break;
                    }
                    if slot.0 == 0 {
                        *slot = (key, 1);
                        *used += 1;
                        break;
                    }
                    at += 1;
                }
            }
            self.seen = self.seen.saturating_add((offsets.len() - long.len()) as u64);
            for n in long.drain(..) {
                let end = |n: usize| ends.base.wrapping_add(offsets[n] as usize);
                self.add(&text[n.checked_sub(1).map_or(start, end)..end(n)]);
            }
            start = end;
        }
    }

    /// Grows until there is room for so many more short words.
    fn make_room(&mut self, words: usize) {
        while (self.used + words) * 8 > self.slots.len() * 5 && !self.given_up {
            self.grow();
        }
    }

    fn is_stopped(&self) -> bool {
        self.stop.as_ref().is_some_and(Stop::is_now)
    }

    fn grow(&mut self) {
        let size = next_size(self.slots.len());
        let mut bigger = Vec::with_capacity(size);
        pages::large(&bigger);
        // Written before it is read: zeroed memory that is read first gets a page that all share, and its own with the
        // first write, of which every thread's processor must be told. On two threads that took a fifth of counting.
        while bigger.len() < size {
            // A small table grows in no time.
            if !bigger.is_empty() && self.is_stopped() {
                self.given_up = true;
                return;
            }
            bigger.resize(size.min(bigger.len() + TOUCHED_AT_ONCE), (0, 0));
        }
        let old = std::mem::replace(&mut self.slots, bigger);
        let mask = self.slots.len() - 1;
        for (n, part) in old.chunks(TOUCHED_AT_ONCE).enumerate() {
            if n > 0 && self.is_stopped() {
                self.given_up = true;
                return;
            }
            for &(key, count) in part.iter().filter(|slot| slot.0 != 0) {
                let mut at = self.hasher.place(key, self.slots.len());
                while self.slots[at].0 != 0 {
                    at = (at + 1) & mask;
                }
                self.slots[at] = (key, count);
            }
        }
    }

    /// Adds the counts of `other`.
    ///
    /// # Errors
    /// [`Error::Interrupted`], with a part of them added.
    pub fn merge(&mut self, mut other: Self, progress: &Progress) -> Result<()> {
        if other.used > self.used {
            std::mem::swap(self, &mut other);
        }
        self.stop = Some(progress.stop_flag());
        let mut words = other.slots.into_iter().filter(|slot| slot.0 != 0).peekable();
        let mut batch = Vec::with_capacity(BATCH);
        while words.peek().is_some() {
            // As in `add_run`: all slots of a batch are asked for before the first one is looked at.
            self.make_room(BATCH);
            let (hasher, size) = (self.hasher, self.slots.len());
            batch.clear();
            batch.extend(words.by_ref().take(BATCH).map(|(key, count)| (key, hasher.place(key, size), count)));
            for &(_, place, _) in &batch {
                prefetch(&self.slots, place);
            }
            for &(key, place, count) in &batch {
                self.add_at(key, place, count);
            }
            progress.check()?;
            self.whole()?;
        }
        self.whole()?;
        self.stop = None;
        #[expect(clippy::iter_over_hash_type, reason = "a sum does not depend on the order")]
        for (word, count) in other.long {
            self.add_many(&word, count);
        }
        Ok(())
    }

    /// Words counted, repeats included.
    ///
    /// # Errors
    /// 2⁶⁴ − 1 or more.
    pub fn total(&self) -> Result<u64> {
        let counts = self.slots.iter().map(|slot| slot.1).chain(self.long.values().copied());
        let sum = counts.fold(0u64, u64::saturating_add);
        if sum == u64::MAX {
            return Err(Error::Config("counts: found 2^64 - 1 words or more; expected fewer".into()));
        }
        Ok(sum)
    }

    /// Bytes of the words of more than 15 bytes.
    pub(crate) fn long_bytes(&self) -> usize {
        self.long_bytes
    }

    /// Bytes that it holds.
    pub(crate) fn memory(&self) -> usize {
        self.slots.len() * SLOT + long_memory(self.long.len(), self.long.capacity(), self.long_bytes)
    }

    /// Bytes that it holds at most while it takes in a text of `bytes` bytes: every word in it may be new, and of two
    /// bytes, or of 16; a table that grows lies beside the larger one for a moment.
    pub(crate) fn peak_after(&self, bytes: usize) -> usize {
        let (used, mut slots) = (self.used + BATCH + bytes / 2, self.slots.len());
        while used * 8 > slots * 5 {
            slots = next_size(slots);
        }
        let short = if slots > self.slots.len() { slots * SLOT / 2 * 3 } else { slots * SLOT };
        let words = self.long.len() + bytes / (PACKED + 1);
        let room = self.long.capacity();
        let long = long_memory(words, room, self.long_bytes + bytes);
        let grown = if words > room { long_memory(0, 2 * words, 0) } else { 0 };
        // Beside it its longer words are sorted.
        short + long + grown + words * size_of::<(Box<[u8]>, u64)>()
    }

    /// Number of distinct words.
    pub fn len(&self) -> usize {
        self.used + self.long.len()
    }

    /// Whether nothing was counted.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The size of a table that follows a smaller one: in fewer steps while it is small, as each is touched anew.
fn next_size(slots: usize) -> usize {
    if slots < 1 << 17 { 4 * slots } else { 2 * slots }
}

/// Bytes of a slot.
const SLOT: usize = size_of::<(u128, u64)>();

/// Bytes of a table of `words` longer words, with room for `room`, of `bytes` bytes together, the allocator's share
/// included.
fn long_memory(words: usize, room: usize, bytes: usize) -> usize {
    let buckets = (room * 8 / 7).next_power_of_two();
    buckets * (size_of::<(Box<[u8]>, u64)>() + 1) + bytes + 24 * words
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        #[test]
        fn counts_equal_a_plain_map(words in prop::collection::vec("[ab\u{0}]{0,20}", 0..3000)) {
            let mut expected = BTreeMap::new();
            let (mut a, mut b) = (WordCounts::default(), WordCounts::default());
            for (i, word) in words.iter().enumerate().filter(|(_, w)| !w.is_empty()) {
                *expected.entry(word.as_bytes().to_vec()).or_insert(0u64) += 1;
                if i % 3 == 0 { a.add(word.as_bytes()) } else { b.add(word.as_bytes()) }
            }
            a.merge(b, &Progress::default()).unwrap();
            prop_assert_eq!(a.len(), expected.len());
            for mut sorted in [a.sorted_words(&Progress::default()).unwrap(), a.clone().into_sorted_words(&Progress::default()).unwrap()] {
                let mut words = Vec::new();
                while sorted.next() {
                    words.push((sorted.word().to_vec(), sorted.count()));
                }
                prop_assert!(words.iter().eq(expected.iter().map(|(word, count)| (word.clone(), *count)).collect::<Vec<_>>().iter()));
            }
            prop_assert_eq!(a.into_sorted().into_iter().collect::<BTreeMap<_, _>>(), expected);
        }
    }
}
