//! A table of words and how often each occurs.
//!
//! In: words, one by one or as the ends of those of a text. Out: [`WordCounts`], u64 counts that can be added to others, and
//! the same sorted. Filled by `count`, kept by `counts`.

use std::collections::HashMap;

use foldhash::fast::FixedState;

use crate::error::{Error, Result};
use crate::hash::{self, prefetch};
use crate::packed::{PACKED, hash_packed, pack, pack_at, packed_len};
use crate::pages;
use crate::pretokenize::Ends;
use crate::words::{Frequencies, Words};

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
    seed: u64,
    /// Short words whose slots have been asked for, and how many: (key, index of the slot).
    waiting: (Box<[(u128, u32); BATCH]>, usize),
}

impl Default for WordCounts {
    fn default() -> Self {
        let (long, waiting) = (HashMap::with_hasher(hash::state()), (Box::new([(0, 0); BATCH]), 0));
        Self { slots: vec![(0, 0); 1 << 12], used: 0, seen: 0, long, long_bytes: 0, seed: hash::seed(), waiting }
    }
}

impl WordCounts {
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
        self.add_hashed(key, hash_packed(key) ^ self.seed, count);
    }

    #[inline]
    fn add_hashed(&mut self, key: u128, hash: u64, count: u64) {
        let mask = self.slots.len() - 1;
        let mut at = hash as usize & mask;
        loop {
            let slot = &mut self.slots[at];
            if slot.0 == key {
                slot.1 = slot.1.saturating_add(count);
                return;
            }
            if slot.0 == 0 {
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
        let (mut start, base) = (ends.start, ends.base);
        for offsets in ends.offsets.chunks(BATCH) {
            self.make_room(offsets.len());
            start = self.ask(text, start, base, offsets);
            self.seen = self.seen.saturating_add(self.waiting.1 as u64);
            let Self { slots, used, waiting, .. } = self;
            let mask = slots.len() - 1;
            for &(key, at) in &waiting.0[..waiting.1] {
                let mut at = at as usize;
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
        }
    }

    /// Packs words and asks for their slots; long words are counted at once. Returns the end of the last one.
    #[inline]
    fn ask(&mut self, text: &[u8], mut start: usize, base: usize, offsets: &[u32]) -> usize {
        let Self { slots, waiting: (waiting, found), seed, .. } = self;
        let (slots, seed, mask) = (&slots[..], *seed, slots.len() - 1);
        let mut n = 0;
        let mut long = Vec::new();
        for &offset in offsets {
            let end = base.wrapping_add(offset as usize);
            let len = end.wrapping_sub(start);
            let key = pack_at(text, start, len);
            if key == 0 {
                long.push(start..end);
            } else {
                let at = (hash_packed(key) ^ seed) as usize & mask;
                prefetch(slots, at);
                waiting[n & (BATCH - 1)] = (key, at as u32);
                n = n.wrapping_add(1);
            }
            start = end;
        }
        *found = n;
        for word in long {
            self.add(&text[word]);
        }
        start
    }

    /// Grows until there is room for so many more short words.
    fn make_room(&mut self, words: usize) {
        while (self.used + words) * 8 > self.slots.len() * 5 {
            self.grow();
        }
    }

    fn grow(&mut self) {
        let size = next_size(self.slots.len());
        let mut bigger = Vec::with_capacity(size);
        pages::large(&bigger);
        // Written before it is read: zeroed memory that is read first gets a page that all share, and its own with the
        // first write, of which every thread's processor must be told. On two threads that took a fifth of counting.
        bigger.resize(size, (0, 0));
        let old = std::mem::replace(&mut self.slots, bigger);
        let mask = self.slots.len() - 1;
        for (key, count) in old.into_iter().filter(|slot| slot.0 != 0) {
            let mut at = (hash_packed(key) ^ self.seed) as usize & mask;
            while self.slots[at].0 != 0 {
                at = (at + 1) & mask;
            }
            self.slots[at] = (key, count);
        }
    }

    /// Adds the counts of `other`.
    pub fn merge(&mut self, mut other: Self) {
        if other.used > self.used {
            std::mem::swap(self, &mut other);
        }
        let mut words = other.slots.into_iter().filter(|slot| slot.0 != 0);
        let mut batch = Vec::with_capacity(BATCH);
        loop {
            // As in `add_run`: all slots of a batch are asked for before the first one is looked at.
            batch.clear();
            batch.extend(words.by_ref().take(BATCH).map(|(key, count)| (key, hash_packed(key) ^ self.seed, count)));
            let mask = self.slots.len() - 1;
            for &(_, hash, _) in &batch {
                prefetch(&self.slots, hash as usize & mask);
            }
            for &(key, hash, count) in &batch {
                self.add_hashed(key, hash, count);
            }
            if batch.is_empty() {
                break;
            }
        }
        #[expect(clippy::iter_over_hash_type, reason = "a sum does not depend on the order")]
        for (word, count) in other.long {
            self.add_many(&word, count);
        }
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

    /// The words in the order of their bytes, in the memory of the table.
    pub(crate) fn into_sorted_words(self) -> SortedWords {
        let mut short = self.slots;
        short.retain(|slot| slot.0 != 0);
        // The first byte of a word is the lowest one of its key, its length the highest: swapped, words compare as
        // their bytes do, and of two that differ in zero bytes at the end the shorter comes first.
        short.sort_unstable_by_key(|slot| slot.0.swap_bytes());
        let mut long: Vec<_> = self.long.into_iter().collect();
        long.sort_unstable();
        SortedWords { short: short.into_iter(), long: long.into_iter(), next: None, now: None }
    }

    /// Number of distinct words.
    pub fn len(&self) -> usize {
        self.used + self.long.len()
    }

    /// Whether nothing was counted.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Calls `f` with every word and its count, in no particular order.
    pub(crate) fn for_each(&self, mut f: impl FnMut(&[u8], u64)) {
        for (key, count) in self.slots.iter().filter(|slot| slot.0 != 0) {
            f(&key.to_le_bytes()[..packed_len(*key)], *count);
        }
        #[expect(clippy::iter_over_hash_type, reason = "no order is promised")]
        for (word, &count) in &self.long {
            f(word, count);
        }
    }

    /// Every word with its count, the most frequent first: in training, what is read often lies together.
    pub fn into_words(self) -> Words {
        let mut frequencies = Frequencies::default();
        self.for_each(|word, count| frequencies.add(word.len(), count));
        let mut placer = frequencies.place();
        self.for_each(|word, count| placer.push(word, count));
        placer.into_words()
    }

    /// Every word with its count, the most frequent first, equals in the order of their bytes: no trace of a
    /// hash table's order is left.
    pub fn into_sorted(self) -> Vec<(Vec<u8>, u64)> {
        let words = self.into_words();
        let mut words: Vec<_> = words.iter().map(|(word, count)| (word.to_vec(), count)).collect();
        words.sort_unstable_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        words
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

fn short_word(bytes: &[u8; 16]) -> &[u8] {
    &bytes[..usize::from(bytes[15])]
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
            a.merge(b);
            prop_assert_eq!(a.len(), expected.len());
            prop_assert_eq!(a.into_sorted().into_iter().collect::<BTreeMap<_, _>>(), expected);
        }
    }
}
