//! Pre-tokens → how often each occurs.
//!
//! In: chunks of text. Out: [`WordCounts`], u64 counts that can be merged, so that any split of the work
//! gives the same sum. Called by `train`.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;

use foldhash::fast::FixedState;

use crate::error::{Error, Result};
use crate::hash::{self, prefetch};
use crate::input::{Chunk, ChunkReader, Inputs};
use crate::pages;
use crate::pretokenize::{Ends, Piece, Splitter, TextPolicy};
use crate::progress::{Progress, Stage};
use crate::words::Words;

/// Longest word that is packed with its length into 16 bytes.
const PACKED: usize = 15;

/// A word of at most 15 bytes with its length in the top byte; 0 is no word.
pub(crate) fn pack(word: &[u8]) -> Option<u128> {
    let n = word.len();
    let u64_at = |i: usize| -> u64 {
        let mut b = [0; 8];
        b.copy_from_slice(&word[i..i + 8]);
        u64::from_le_bytes(b)
    };
    let u32_at = |i: usize| -> u64 {
        let mut b = [0; 4];
        b.copy_from_slice(&word[i..i + 4]);
        u64::from(u32::from_le_bytes(b))
    };
    // Two loads that overlap instead of a copy of variable length: the copy is a call, which costs as much as
    // the look-up.
    let (low, high) = match n {
        0 => return None,
        1..=3 => {
            let (first, middle, last) = (word[0], word[n / 2], word[n - 1]);
            let bytes = u64::from(first) | u64::from(middle) << (8 * (n / 2)) | u64::from(last) << (8 * (n - 1));
            (bytes, 0)
        }
        4..=7 => (u32_at(0) | u32_at(n - 4) << (8 * (n - 4)), 0),
        8 => (u64_at(0), 0),
        9..=PACKED => (u64_at(0), u64_at(n - 8) >> (8 * (16 - n))),
        _ => return None,
    };
    Some(u128::from(low) | u128::from(high) << 64 | (n as u128) << 120)
}

/// Bytes of a packed word.
pub(crate) fn packed_len(key: u128) -> usize {
    (key >> 120) as usize
}

/// A hash of a packed word: one multiplication of its two halves, folded.
pub(crate) fn hash_packed(key: u128) -> u64 {
    let product =
        u128::from(key as u64 ^ 0x9e37_79b9_7f4a_7c15) * u128::from((key >> 64) as u64 ^ 0xd1b5_4a32_d192_ed03);
    product as u64 ^ (product >> 64) as u64
}

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
    fn add_run(&mut self, text: &[u8], ends: &Ends<'_>) {
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
                        slot.1 += 1;
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
            // One load whatever the length, where the text goes on for so long.
            let key = match text.get(start..).and_then(|rest| rest.first_chunk()) {
                Some(bytes) if len <= PACKED => u128::from_le_bytes(*bytes) & FIRST[len] | (len as u128) << 120,
                _ => pack(&text[start..end]).unwrap_or_default(),
            };
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
        let bigger = vec![(0, 0); next_size(self.slots.len())];
        pages::large(&bigger);
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
        for (key, count) in other.slots.into_iter().filter(|slot| slot.0 != 0) {
            self.add_packed(key, count);
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

    /// Every word with its count, the most frequent first: in training, what is read often lies together.
    pub fn into_words(self) -> Words {
        self.words()
    }

    /// [`Self::into_words`] of a copy.
    pub fn words(&self) -> Words {
        let short = (0..).zip(&self.slots).filter(|(_, slot)| slot.0 != 0).map(|(at, slot)| (slot.1, at));
        let mut order: Vec<(u64, u32)> = short.collect();
        let long: Vec<(&[u8], u64)> = self.long.iter().map(|(word, &count)| (&**word, count)).collect();
        let slots = self.slots.len();
        order.extend((slots as u32..).zip(&long).map(|(at, &(_, count))| (count, at)));
        order.sort_unstable_by_key(|&(count, _)| std::cmp::Reverse(count));
        let bytes = self.slots.iter().map(|slot| packed_len(slot.0)).sum::<usize>();
        let mut words =
            Words::with_capacity(order.len(), bytes + long.iter().map(|(word, _)| word.len()).sum::<usize>());
        for (count, at) in order {
            match self.slots.get(at as usize) {
                Some(slot) => words.push(&slot.0.to_le_bytes()[..packed_len(slot.0)], count),
                None => words.push(long[at as usize - slots].0, count),
            }
        }
        words
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

/// Counts the pre-tokens of inputs on `threads` threads.
pub fn count_files(
    inputs: &Inputs,
    splitter: &Splitter,
    policy: TextPolicy,
    threads: usize,
    chunk_bytes: usize,
    progress: &Progress,
) -> Result<WordCounts> {
    progress.begin(Stage::Count, inputs.total_bytes());
    let reader = ChunkReader::new(inputs, splitter, chunk_bytes).stopped_by(progress);
    let pause = || progress.check().map(|()| false);
    let (tables, _) = count_tables(&reader, (inputs, policy), threads, progress, |_, _| Ok(()), pause)?;
    let joined = tables.into_iter().reduce(|mut all, table| {
        all.merge(table);
        all
    });
    Ok(joined.unwrap_or_default())
}

/// The same of what `reader` hands out, each thread with a table of its own; `make_room` sees it before it takes in so
/// many bytes of text. Once `pause` says so, no more is taken: then all that was handed out is counted. The number is
/// that of documents that ended: records, or files.
pub(crate) fn count_tables(
    reader: &ChunkReader<'_>,
    (inputs, policy): (&Inputs, TextPolicy),
    threads: usize,
    progress: &Progress,
    make_room: impl Fn(&mut WordCounts, usize) -> Result<()> + Sync,
    pause: impl Fn() -> Result<bool> + Sync,
) -> Result<(Vec<WordCounts>, u64)> {
    let (make_room, pause) = (&make_room, &pause);
    let documents = AtomicU64::new(0);
    let work = || -> Result<WordCounts> {
        let mut counts = WordCounts::default();
        let mut chunk = Chunk::default();
        while !pause()? && reader.next(&mut chunk)? {
            make_room(&mut counts, chunk.bytes.len())?;
            let before = counts.seen;
            for (start, text) in chunk.texts() {
                let counted = count_text(text, reader.splitter(&chunk), policy, &mut counts);
                counted.map_err(|e| inputs.locate(&chunk, start, e))?;
            }
            progress.add(chunk.read_bytes);
            progress.add_pretokens(counts.seen - before);
            let ended = if chunk.records { chunk.record_count() } else { chunk.ends_file.into() };
            documents.fetch_add(ended, Relaxed);
        }
        Ok(counts)
    };
    let tables: Result<Vec<WordCounts>> = thread::scope(|scope| {
        let others: Vec<_> = (1..threads.max(1)).map(|_| scope.spawn(work)).collect();
        let mut all = vec![work()];
        // A panic in a thread is a defect of ours; let it go on as one.
        let join = |other: thread::ScopedJoinHandle<'_, _>| {
            other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        all.extend(others.into_iter().map(join));
        all.into_iter().collect()
    });
    Ok((tables?, documents.into_inner()))
}

/// Words whose slots are asked for together.
const BATCH: usize = 512;

/// All bits of the first so many bytes.
const FIRST: [u128; 16] = {
    let mut masks = [0; 16];
    let mut n = 1;
    while n < 16 {
        masks[n] = u128::MAX >> (128 - 8 * n);
        n += 1;
    }
    masks
};

/// Counts the pre-tokens of one text.
pub fn count_text(bytes: &[u8], splitter: &Splitter, policy: TextPolicy, counts: &mut WordCounts) -> Result<()> {
    let Ok(text) = simdutf8::basic::from_utf8(bytes) else {
        return splitter.split_bytes(bytes, policy, |piece| {
            if let Piece::Word(word) = piece {
                counts.add(word);
            }
        });
    };
    splitter.split_ends(text, |ends| counts.add_run(bytes, &ends), |_| {})
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        #[test]
        fn packing_is_injective(word in prop::collection::vec(any::<u8>(), 1..=PACKED)) {
            let key = pack(&word).unwrap();
            prop_assert_eq!(&key.to_le_bytes()[..packed_len(key)], word);
        }

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
