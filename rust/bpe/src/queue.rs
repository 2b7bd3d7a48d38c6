//! Pairs and their counts, and which of them is the most frequent.
//!
//! In: pairs with counts that only fall afterwards. Out: the most frequent pair, ties by rule. Called by `train`.
//!
//! A pair lies in the bucket of the count that it had when it was put there. Its true count may have fallen since:
//! then it is put into a lower bucket once its old one is reached. As no count rises, buckets are visited from the
//! highest down, each once. Only pairs that share the bucket being visited are ever compared by the rule.

use std::cmp::Ordering;

use crate::hash::{self, prefetch};
use crate::ties::Ties;
use crate::train::Pair;

/// Counts below have a bucket each; the few pairs above are in a heap.
const BUCKETS: usize = 1 << 14;
/// No pair: the end of a bucket's list, and a free slot.
const NONE: u32 = u32::MAX;

/// A pair of neighbouring tokens.
#[derive(Clone, Copy)]
pub(crate) struct Entry {
    pub(crate) pair: Pair,
    /// Occurrences now; exact.
    pub(crate) count: u64,
    /// Where its postings are.
    pub(crate) from: u32,
    pub(crate) len: u32,
    /// The next one of the same bucket.
    next: u32,
}

/// All pairs that may still be merged.
pub(crate) struct Queue {
    entries: Vec<Entry>,
    /// Open addressing, at most half full: (index in `entries`, 32 other bits of the hash).
    slots: Vec<(u32, u32)>,
    /// Heads of the lists of pairs by count.
    buckets: Vec<u32>,
    /// Pairs of `BUCKETS` and more, a binary heap by (count when pushed, rule).
    heap: Vec<(u64, u32)>,
    /// The bucket that is being visited.
    level: usize,
    /// Its pairs, the first to merge last.
    now: Vec<u32>,
    /// Pairs less frequent than this are of no interest.
    least: u64,
    /// Pairs whose token would have more bytes are of none either.
    longest: usize,
}

fn hash_pair((a, b): Pair) -> u64 {
    let key = (u64::from(a) << 32 | u64::from(b)) ^ hash::seed();
    let product = u128::from(key ^ 0x9e37_79b9_7f4a_7c15) * 0xa076_1d64_78bd_642f;
    (product >> 64) as u64 ^ product as u64
}

impl Queue {
    /// Empty; never gives out a pair of fewer than `least` occurrences, or of more than `longest` bytes.
    pub(crate) fn new(least: u64, longest: usize) -> Self {
        let (slots, buckets) = (vec![(NONE, 0); 1 << 12], vec![NONE; BUCKETS]);
        let least = least.max(1);
        Self {
            entries: Vec::with_capacity(1 << 16),
            slots,
            buckets,
            heap: Vec::new(),
            level: BUCKETS,
            now: Vec::new(),
            least,
            longest,
        }
    }

    /// Whether a pair can ever be given out.
    pub(crate) fn wants(&self, ties: &Ties, (a, b): Pair, count: u64) -> bool {
        count >= self.least && ties.len_of(a) + ties.len_of(b) <= self.longest
    }

    /// A pair by its index.
    pub(crate) fn entry(&self, index: u32) -> &Entry {
        &self.entries[index as usize]
    }

    /// Puts in a pair that was never in before.
    pub(crate) fn insert(&mut self, ties: &Ties, pair: Pair, count: u64, from: u32, len: u32) {
        let index = self.entries.len() as u32;
        self.entries.push(Entry { pair, count, from, len, next: NONE });
        if self.entries.len() * 2 > self.slots.len() {
            self.grow();
        } else {
            Self::place(&mut self.slots, hash_pair(pair), index);
        }
        self.file(ties, index);
    }

    fn place(slots: &mut [(u32, u32)], hash: u64, index: u32) {
        let mask = slots.len() - 1;
        let mut at = hash as usize & mask;
        while slots[at].0 != NONE {
            at = (at + 1) & mask;
        }
        slots[at] = (index, (hash >> 32) as u32);
    }

    fn grow(&mut self) {
        let mut slots = vec![(NONE, 0); self.slots.len() * 2];
        for (index, entry) in (0..).zip(&self.entries) {
            Self::place(&mut slots, hash_pair(entry.pair), index);
        }
        self.slots = slots;
    }

    /// Asks for the place of a pair that will be looked up soon.
    pub(crate) fn ask(&self, pair: Pair) {
        prefetch(&self.slots, hash_pair(pair) as usize & (self.slots.len() - 1));
    }

    /// `pair` lost so many occurrences.
    pub(crate) fn lose(&mut self, pair: Pair, count: u64) {
        let (hash, mask) = (hash_pair(pair), self.slots.len() - 1);
        let (mut at, tag) = (hash as usize & mask, (hash >> 32) as u32);
        loop {
            let (index, known) = self.slots[at];
            if index == NONE {
                return; // too rare to be in
            }
            if known == tag && self.entries[index as usize].pair == pair {
                self.entries[index as usize].count -= count;
                return;
            }
            at = (at + 1) & mask;
        }
    }

    /// Puts an entry where its count says.
    fn file(&mut self, ties: &Ties, index: u32) {
        let Entry { count, pair, .. } = self.entries[index as usize];
        if count < self.least {
            return;
        }
        if count >= BUCKETS as u64 {
            self.push(ties, count, index);
        } else if count as usize == self.level {
            // Only among the others of the bucket that is being visited it has a place.
            let at = self.now.partition_point(|&other| ties.cmp(self.entries[other as usize].pair, pair).is_lt());
            self.now.insert(at, index);
        } else {
            debug_assert!((count as usize) < self.level, "a count rose");
            let head = &mut self.buckets[count as usize];
            self.entries[index as usize].next = std::mem::replace(head, index);
        }
    }

    /// The most frequent pair, which is given out once.
    pub(crate) fn pop(&mut self, ties: &Ties) -> Option<u32> {
        while let Some((count, index)) = self.pop_heap(ties) {
            if self.entries[index as usize].count == count {
                return Some(index);
            }
            self.file(ties, index);
        }
        loop {
            while let Some(index) = self.now.pop() {
                if self.entries[index as usize].count as usize == self.level {
                    return Some(index);
                }
                self.file(ties, index);
            }
            if self.level as u64 <= self.least {
                return None;
            }
            self.visit(ties, self.level - 1);
        }
    }

    /// Whether another pair is as frequent as the one that was given out last, with `count` occurrences: then the rule
    /// decided.
    pub(crate) fn tied(&mut self, ties: &Ties, count: u64) -> bool {
        if count >= BUCKETS as u64 {
            while let Some(&(pushed, index)) = self.heap.first() {
                if pushed < count || self.entries[index as usize].count == pushed {
                    return pushed == count;
                }
                self.pop_heap(ties);
                self.file(ties, index);
            }
            return false;
        }
        while let Some(&index) = self.now.last() {
            if self.entries[index as usize].count as usize == self.level {
                return true;
            }
            self.now.pop();
            self.file(ties, index);
        }
        false
    }

    /// Goes on to a bucket: its own pairs in the order of the rule, the others to where they belong.
    fn visit(&mut self, ties: &Ties, level: usize) {
        self.level = level;
        let mut index = std::mem::replace(&mut self.buckets[level], NONE);
        while index != NONE {
            let Entry { count, next, .. } = self.entries[index as usize];
            if count as usize == level {
                self.now.push(index);
            } else {
                self.file(ties, index);
            }
            index = next;
        }
        let entries = &self.entries;
        self.now.sort_unstable_by(|&a, &b| ties.cmp(entries[a as usize].pair, entries[b as usize].pair));
    }

    fn before(&self, ties: &Ties, a: usize, b: usize) -> bool {
        let (x, y) = (self.heap[a], self.heap[b]);
        let by_rule = || ties.cmp(self.entries[x.1 as usize].pair, self.entries[y.1 as usize].pair);
        x.0.cmp(&y.0).then_with(by_rule) == Ordering::Greater
    }

    fn push(&mut self, ties: &Ties, count: u64, index: u32) {
        self.heap.push((count, index));
        let mut at = self.heap.len() - 1;
        while at > 0 && self.before(ties, at, (at - 1) / 2) {
            self.heap.swap(at, (at - 1) / 2);
            at = (at - 1) / 2;
        }
    }

    fn pop_heap(&mut self, ties: &Ties) -> Option<(u64, u32)> {
        if self.heap.is_empty() {
            return None;
        }
        let top = self.heap.swap_remove(0);
        let mut at = 0;
        loop {
            let left = 2 * at + 1;
            if left >= self.heap.len() {
                return Some(top);
            }
            let right = left + 1;
            let best = if right < self.heap.len() && self.before(ties, right, left) { right } else { left };
            if !self.before(ties, best, at) {
                return Some(top);
            }
            self.heap.swap(at, best);
            at = best;
        }
    }
}
