//! Text → ids and back.
//!
//! In: a [`Vocab`]. Out: [`Encoder`], which is immutable and may be used by any number of threads; each call
//! borrows a [`Scratch`] with the table of words that it has met. Called by `corpus` and the binding;
//! `naive` is the specification.
//!
//! Cost: a word met before is one look-up. A new word of up to [`SHORT`] bytes is merged by scanning its
//! ranks (fast in a cache line or two, quadratic), a longer one with a heap (n log n).

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;

use crate::error::{Error, Result};
use crate::hash::prefetch;
use crate::packed::{hash_packed, pack, pack_at, packed_len};
use crate::pages;
use crate::pretokenize::{Ends, Pattern, Piece, Run, SplitStream, Splitter, TextPolicy};
use crate::train::{Pair, TokenId};
use crate::vocab::Vocab;

/// Longest piece, in bytes, that is merged by scanning.
const SHORT: usize = 48;
/// Ids that fit into a slot of the word table.
const INLINE: usize = 3;
/// Slots of a new word table: few, since the first short text makes one, too.
const FIRST_SLOTS: usize = 1 << 10;
/// Slots of a word table that is full; it is emptied then, so its memory stays bounded.
const MOST_SLOTS: usize = 1 << 19;
/// Ids kept for words with more than [`INLINE`] of them, before the table is emptied.
const MOST_SPILLED: usize = 1 << 21;

/// Bytes of text that make another thread worth starting.
const BATCH_BYTES_A_THREAD: usize = 1 << 16;

/// Words that are looked up together: pieces, and words of a run.
const BATCH: usize = 32;
const RUN: usize = 64;

const NO_RANK: u32 = u32::MAX;

/// Which special tokens a text may contain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allowed<'a> {
    /// None: their text is ordinary text.
    None,
    /// Every special token of the vocabulary.
    All,
    /// Those named; the others are ordinary text.
    Only(&'a [String]),
}

/// Pair → (rank, id), open addressing with linear probing, at most half full.
#[derive(Debug)]
struct PairTable {
    slots: Vec<(u64, u32, TokenId)>,
    mask: usize,
}

const NO_PAIR: u64 = u64::MAX;

impl PairTable {
    fn new(vocab: &Vocab) -> Self {
        let size = (vocab.merges().len() * 2 + 2).next_power_of_two();
        let mut this = Self { slots: vec![(NO_PAIR, NO_RANK, 0); size], mask: size - 1 };
        for merge in vocab.merges() {
            let key = Self::key(merge.pair);
            let mut at = this.home(key);
            while this.slots[at].0 != NO_PAIR && this.slots[at].0 != key {
                at = (at + 1) & this.mask;
            }
            // Of a merge that is listed twice the first counts.
            if this.slots[at].0 == NO_PAIR {
                this.slots[at] = (key, merge.rank, merge.id);
            }
        }
        this
    }

    fn key(pair: Pair) -> u64 {
        u64::from(pair.0) << 32 | u64::from(pair.1)
    }

    fn home(&self, key: u64) -> usize {
        (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize & self.mask
    }

    /// Rank and result of a pair; [`NO_RANK`] where it does not merge.
    #[inline]
    fn get(&self, pair: Pair) -> (u32, TokenId) {
        let key = Self::key(pair);
        let mut at = self.home(key);
        loop {
            let slot = &self.slots[at];
            if slot.0 == key {
                return (slot.1, slot.2);
            }
            if slot.0 == NO_PAIR {
                return (NO_RANK, 0);
            }
            at = (at + 1) & self.mask;
        }
    }
}

/// A slot of the word table: 32 bytes, two a cache line.
#[derive(Debug, Clone, Copy)]
struct Slot {
    key: u128,
    /// Number of ids; where they are more than [`INLINE`], `ids[0]` says where they begin in `spilled`.
    len: u32,
    ids: [TokenId; INLINE],
}

const FREE: Slot = Slot { key: 0, len: 0, ids: [0; INLINE] };

/// What a call works with: the table of words met so far and buffers. Bounded by [`MOST_SLOTS`].
#[derive(Debug)]
pub struct Scratch {
    slots: Vec<Slot>,
    used: usize,
    spilled: Vec<TokenId>,
    /// Packed words whose ids are still to come.
    waiting: Vec<u128>,
    parts: Parts,
}

#[derive(Debug, Default)]
struct Parts {
    ids: Vec<TokenId>,
    /// Rank and result of each part with the next.
    joins: Vec<(u32, TokenId)>,
    next: Vec<u32>,
    previous: Vec<u32>,
    heap: BinaryHeap<Reverse<(u32, u32)>>,
}

impl Default for Scratch {
    fn default() -> Self {
        Self {
            slots: vec![FREE; FIRST_SLOTS],
            used: 0,
            spilled: Vec::new(),
            waiting: Vec::new(),
            parts: Parts::default(),
        }
    }
}

impl Scratch {
    /// Where the search for a word begins.
    #[inline]
    fn home(&self, key: u128) -> usize {
        hash_packed(key) as usize & (self.slots.len() - 1)
    }

    /// The slot of a word, or the free one where it belongs.
    #[inline]
    fn find(&self, key: u128) -> usize {
        self.find_hashed(key, hash_packed(key))
    }

    #[inline]
    fn find_hashed(&self, key: u128, hash: u64) -> usize {
        let mask = self.slots.len() - 1;
        let mut at = hash as usize & mask;
        while self.slots[at].key != key && self.slots[at].key != 0 {
            at = (at + 1) & mask;
        }
        at
    }

    fn remember(&mut self, key: u128, ids: &[TokenId]) {
        let full = self.used * 8 >= self.slots.len() * 5;
        if self.spilled.len() >= MOST_SPILLED || (full && self.slots.len() >= MOST_SLOTS) {
            self.slots.fill(FREE);
            self.spilled.clear();
            self.used = 0;
        } else if full {
            let size = (self.slots.len() * 4).min(MOST_SLOTS);
            let mut bigger = Vec::with_capacity(size);
            pages::large(&bigger);
            bigger.resize(size, FREE);
            let old = std::mem::replace(&mut self.slots, bigger);
            for slot in old.into_iter().filter(|slot| slot.key != 0) {
                let at = self.find(slot.key);
                self.slots[at] = slot;
            }
        }
        let mut inline = [0; INLINE];
        if ids.len() <= INLINE {
            inline[..ids.len()].copy_from_slice(ids);
        } else {
            inline[0] = self.spilled.len() as u32;
            self.spilled.extend_from_slice(ids);
        }
        let at = self.find(key);
        self.slots[at] = Slot { key, len: ids.len() as u32, ids: inline };
        self.used += 1;
    }
}

/// Encodes and decodes with one vocabulary.
#[derive(Debug)]
pub struct Encoder {
    vocab: Vocab,
    pairs: PairTable,
    /// Splits at every special token.
    splitter: Arc<Splitter>,
    /// Takes special tokens as text.
    ordinary: Arc<Splitter>,
    /// In the order of the splitter's special tokens.
    special_ids: Arc<[TokenId]>,
    hash: OnceLock<String>,
    idle: Mutex<Vec<Scratch>>,
}

impl Encoder {
    /// Prepares the tables of a vocabulary.
    pub fn new(vocab: Vocab) -> Result<Self> {
        let pattern = Arc::new(Pattern::new(vocab.pattern())?);
        let texts: Vec<String> = vocab.specials().iter().map(|special| special.0.clone()).collect();
        Ok(Self {
            pairs: PairTable::new(&vocab),
            splitter: Arc::new(Splitter::new(pattern.clone(), &texts)?),
            ordinary: Arc::new(Splitter::new(pattern, &[])?),
            special_ids: vocab.specials().iter().map(|special| special.1).collect(),
            hash: OnceLock::new(),
            idle: Mutex::default(),
            vocab,
        })
    }

    /// The vocabulary.
    pub fn vocab(&self) -> &Vocab {
        &self.vocab
    }

    /// [`Vocab::hash`], computed when it is first asked for.
    pub fn hash(&self) -> &str {
        self.hash.get_or_init(|| self.vocab.hash())
    }

    /// The splitter that recognises every special token.
    pub fn splitter(&self) -> &Splitter {
        &self.splitter
    }

    /// Runs `f` with a word table that earlier calls may have filled.
    pub fn with_scratch<R>(&self, f: impl FnOnce(&mut Scratch) -> R) -> R {
        let idle = self.idle.lock().ok().and_then(|mut idle| idle.pop());
        let mut scratch = idle.unwrap_or_default();
        let result = f(&mut scratch);
        // What an error left waiting is nobody's.
        scratch.waiting.clear();
        if let Ok(mut idle) = self.idle.lock() {
            idle.push(scratch);
        }
        result
    }

    /// Appends the ids of `text`.
    ///
    /// # Errors
    /// [`Error::Config`] where `allowed` names what is not a special token, [`Error::Text`] where a pattern of
    /// the user's cannot be matched.
    pub fn encode(&self, text: &str, allowed: Allowed<'_>, out: &mut Vec<TokenId>) -> Result<()> {
        let (splitter, ids) = self.splitter_for(allowed)?;
        self.with_scratch(|scratch| {
            splitter.split_runs(text, |run| match run {
                Run::Words(ends) => self.run(text.as_bytes(), &ends, scratch, out),
                Run::Special(index) => out.push(ids[index]),
            })
        })
    }

    /// Appends the ids of bytes that need not be UTF-8.
    pub fn encode_bytes(
        &self,
        bytes: &[u8],
        policy: TextPolicy,
        allowed: Allowed<'_>,
        out: &mut Vec<TokenId>,
    ) -> Result<()> {
        if let Ok(text) = simdutf8::basic::from_utf8(bytes) {
            return self.encode(text, allowed, out);
        }
        let (splitter, ids) = self.splitter_for(allowed)?;
        self.with_scratch(|scratch| {
            let split = splitter.split_bytes(bytes, policy, |piece| self.piece(piece, &ids, scratch, out));
            split.map(|()| self.flush(scratch, out))
        })
    }

    /// Ids of each text, on up to `threads` threads; small batches stay on this one.
    pub fn encode_batch(&self, texts: &[&str], allowed: Allowed<'_>, threads: usize) -> Result<Vec<Vec<TokenId>>> {
        let encode = |text: &&str| {
            let mut ids = Vec::new();
            self.encode(text, allowed, &mut ids).map(|()| ids)
        };
        let bytes: usize = texts.iter().map(|text| text.len()).sum();
        let threads = threads.min(bytes / BATCH_BYTES_A_THREAD).min(texts.len());
        if threads < 2 {
            return texts.iter().map(encode).collect();
        }
        // Each thread takes the next text, so that one long text does not hold up the others.
        let next = AtomicUsize::new(0);
        let work = || -> Result<Vec<(usize, Vec<TokenId>)>> {
            let mut own = Vec::new();
            while let index = next.fetch_add(1, Relaxed)
                && let Some(text) = texts.get(index)
            {
                own.push((index, encode(text)?));
            }
            Ok(own)
        };
        let parts = thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let mut parts = vec![work()];
            parts.extend(others.into_iter().map(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))));
            parts
        });
        let mut all = vec![Vec::new(); texts.len()];
        for part in parts {
            for (index, ids) in part? {
                all[index] = ids;
            }
        }
        Ok(all)
    }

    /// Fails if `text` holds one of the `disallowed` special tokens that `allowed` does not allow.
    pub fn refuse(&self, text: &str, disallowed: Allowed<'_>, allowed: Allowed<'_>) -> Result<()> {
        let names = |set: Allowed<'_>, name: &str| match set {
            Allowed::None => false,
            Allowed::All => true,
            Allowed::Only(names) => names.iter().any(|n| n == name),
        };
        let specials = self.vocab.specials().iter().map(|special| special.0.as_str());
        let mut refused = specials.filter(|s| names(disallowed, s) && !names(allowed, s));
        match refused.find_map(|special| text.find(special).map(|at| (special, at))) {
            None => Ok(()),
            Some((special, at)) => Err(Error::Text(format!(
                "byte offset {at}: special token {special:?} in the text; expected none, \
                 or allow it (allowed_special) or take it as text (disallowed_special=())"
            ))),
        }
    }

    /// A text that arrives in parts, encoded exactly as the whole.
    pub fn stream(self: Arc<Self>, allowed: Allowed<'_>) -> Result<EncodeStream> {
        let (splitter, special_ids) = self.splitter_for(allowed)?;
        Ok(EncodeStream { encoder: self, splitter, special_ids, parts: SplitStream::default() })
    }

    /// Appends the ids of the words of `text` that end at `ends`.
    ///
    /// The slots of a batch are asked for before the first of them is looked at: the table is larger than the caches,
    /// and so the waits overlap.
    pub(crate) fn run(&self, text: &[u8], ends: &Ends<'_>, scratch: &mut Scratch, out: &mut Vec<TokenId>) {
        let mut start = ends.start;
        let mut batch = [(0, 0); RUN];
        for offsets in ends.offsets.chunks(RUN) {
            let mut from = start;
            for (word, &offset) in batch.iter_mut().zip(offsets) {
                let end = ends.base.wrapping_add(offset as usize);
                let key = pack_at(text, from, end.wrapping_sub(from));
                let hash = hash_packed(key);
                prefetch(&scratch.slots, hash as usize & (scratch.slots.len() - 1));
                *word = (key, hash);
                from = end;
            }
            // Room for what most words have: three stores, then on by as many ids as there are.
            let mut at = out.len();
            out.resize(at + offsets.len() * INLINE, 0);
            for (n, (&(key, hash), &offset)) in batch.iter().zip(offsets).enumerate() {
                let end = ends.base.wrapping_add(offset as usize);
                let slot = &scratch.slots[scratch.find_hashed(key, hash)];
                let len = slot.len as usize;
                if slot.key == key && key != 0 && len <= INLINE {
                    out[at..at + INLINE].copy_from_slice(&slot.ids);
                    at += len;
                } else {
                    out.truncate(at);
                    if slot.key == key && key != 0 {
                        let begin = slot.ids[0] as usize;
                        out.extend_from_slice(&scratch.spilled[begin..begin + len]);
                    } else {
                        self.merge(&text[start..end], &mut scratch.parts, out);
                        if key != 0 {
                            scratch.remember(key, &out[at..]);
                        }
                    }
                    at = out.len();
                    out.resize(at + (offsets.len() - n - 1) * INLINE, 0);
                }
                start = end;
            }
            out.truncate(at);
        }
    }

    /// Takes the next piece; its ids are appended now or, with those of its neighbours, by [`Self::flush`].
    #[inline]
    pub(crate) fn piece(
        &self,
        piece: Piece<'_>,
        special_ids: &[TokenId],
        scratch: &mut Scratch,
        out: &mut Vec<TokenId>,
    ) {
        let word = match piece {
            Piece::Word(word) => word,
            Piece::Special(index) => {
                self.flush(scratch, out);
                return out.push(special_ids[index]);
            }
        };
        if let Some(key) = pack(word) {
            scratch.waiting.push(key);
            if scratch.waiting.len() == BATCH {
                self.flush(scratch, out);
            }
        } else {
            self.flush(scratch, out);
            self.merge(word, &mut scratch.parts, out);
        }
    }

    /// Appends the ids of the words that wait.
    ///
    /// The table is far larger than the caches, so a look-up waits for memory. Looking at the slots of all the
    /// words first lets those waits overlap.
    pub(crate) fn flush(&self, scratch: &mut Scratch, out: &mut Vec<TokenId>) {
        let waiting = std::mem::take(&mut scratch.waiting);
        let mut homes = [(0, false); BATCH];
        for (home, &key) in homes.iter_mut().zip(&waiting) {
            let at = scratch.home(key);
            *home = (at, scratch.slots[at].key == key);
        }
        for (&(home, seen), &key) in homes.iter().zip(&waiting) {
            // The table may have grown since: look again.
            let at = if seen && scratch.slots[home].key == key { home } else { scratch.find(key) };
            let slot = &scratch.slots[at];
            let len = slot.len as usize;
            if slot.key != key {
                let begin = out.len();
                let bytes = key.to_le_bytes();
                self.merge(&bytes[..packed_len(key)], &mut scratch.parts, out);
                scratch.remember(key, &out[begin..]);
            } else if len <= INLINE {
                // All the room of the slot, then cut: a copy of fixed length is two stores, one of variable
                // length a call.
                let end = out.len() + len;
                out.extend_from_slice(&slot.ids);
                out.truncate(end);
            } else {
                let begin = slot.ids[0] as usize;
                out.extend_from_slice(&scratch.spilled[begin..begin + len]);
            }
        }
        scratch.waiting = waiting;
        scratch.waiting.clear();
    }

    pub(crate) fn special_ids(&self) -> &[TokenId] {
        &self.special_ids
    }

    /// A splitter for a choice of special tokens, and their ids in its order.
    fn splitter_for(&self, allowed: Allowed<'_>) -> Result<(Arc<Splitter>, Arc<[TokenId]>)> {
        match allowed {
            Allowed::None => Ok((self.ordinary.clone(), Arc::default())),
            Allowed::All => Ok((self.splitter.clone(), self.special_ids.clone())),
            Allowed::Only(names) => {
                let ids = names.iter().map(|name| {
                    let found = self.vocab.specials().iter().find(|special| &special.0 == name);
                    found.map(|special| special.1).ok_or_else(|| {
                        Error::Config(format!(
                            "allowed_special: {name:?} is not a special token; expected some of {:?}",
                            self.splitter.specials()
                        ))
                    })
                });
                let ids = ids.collect::<Result<Arc<[TokenId]>>>()?;
                Ok((Arc::new(Splitter::new(self.splitter.pattern().clone(), names)?), ids))
            }
        }
    }

    /// Merges a word from scratch.
    fn merge(&self, word: &[u8], parts: &mut Parts, out: &mut Vec<TokenId>) {
        if self.vocab.ignore_merges()
            && let Some(id) = self.vocab.id_of(word)
        {
            return out.push(id);
        }
        parts.ids.clear();
        parts.ids.extend(word.iter().map(|&b| self.vocab.byte_ids()[b as usize]));
        if word.len() <= SHORT { self.merge_by_scanning(parts, out) } else { self.merge_by_heap(parts, out) }
    }

    fn merge_by_scanning(&self, parts: &mut Parts, out: &mut Vec<TokenId>) {
        let Parts { ids, joins, .. } = parts;
        joins.clear();
        joins.extend(ids.windows(2).map(|w| self.pairs.get((w[0], w[1]))));
        loop {
            let mut best = (NO_RANK, 0);
            for (at, join) in joins.iter().enumerate() {
                if join.0 < best.0 {
                    best = (join.0, at);
                }
            }
            let (rank, at) = best;
            if rank == NO_RANK {
                return out.extend_from_slice(ids);
            }
            ids[at] = joins[at].1;
            ids.remove(at + 1);
            joins.remove(at);
            if at > 0 {
                joins[at - 1] = self.pairs.get((ids[at - 1], ids[at]));
            }
            if at + 1 < ids.len() {
                joins[at] = self.pairs.get((ids[at], ids[at + 1]));
            }
        }
    }

    /// The same for long words: a linked list of parts and a heap of (rank, place). An entry is stale when
    /// its place has another rank by now; dead places have [`NO_RANK`].
    fn merge_by_heap(&self, parts: &mut Parts, out: &mut Vec<TokenId>) {
        let Parts { ids, joins, next, previous, heap } = parts;
        let n = ids.len();
        joins.clear();
        joins.extend(ids.windows(2).map(|w| self.pairs.get((w[0], w[1]))));
        joins.push((NO_RANK, 0));
        next.clear();
        next.extend(1..=n as u32);
        previous.clear();
        previous.extend((0..n as u32).map(|i| i.wrapping_sub(1)));
        heap.clear();
        heap.extend((0u32..).zip(&*joins).filter(|(_, j)| j.0 != NO_RANK).map(|(at, j)| Reverse((j.0, at))));
        while let Some(Reverse((rank, place))) = heap.pop() {
            let at = place as usize;
            if joins[at].0 != rank {
                continue;
            }
            let gone = next[at] as usize;
            ids[at] = joins[at].1;
            next[at] = next[gone];
            joins[at] = (NO_RANK, 0);
            joins[gone] = (NO_RANK, 0);
            let mut join = |left: usize, right: usize| {
                joins[left] = self.pairs.get((ids[left], ids[right]));
                if joins[left].0 != NO_RANK {
                    heap.push(Reverse((joins[left].0, left as u32)));
                }
            };
            let after = next[at] as usize;
            if after < n {
                previous[after] = place;
                join(at, after);
            }
            if at > 0 {
                join(previous[at] as usize, at);
            }
        }
        let mut at = 0;
        while at < n {
            out.push(ids[at]);
            at = next[at] as usize;
        }
    }

    /// The pieces of `text` inside which merges happen; special tokens count as text.
    pub fn pretokenize(&self, text: &str) -> Result<Vec<String>> {
        let mut pieces = Vec::new();
        self.ordinary.split(text, |piece| {
            if let Piece::Word(word) = piece {
                pieces.push(String::from_utf8_lossy(word).into_owned());
            }
        })?;
        Ok(pieces)
    }

    /// Appends the bytes of `ids`.
    ///
    /// # Errors
    /// [`Error::Config`] for an id that is not in the vocabulary, with its place.
    pub fn decode(&self, ids: &[TokenId], skip_special: bool, out: &mut Vec<u8>) -> Result<()> {
        for (place, &id) in ids.iter().enumerate() {
            let Some(bytes) = self.vocab.token(id) else {
                return Err(Error::Config(format!(
                    "ids[{place}]: found {id}; expected ids below the vocabulary's size {}",
                    self.vocab.len()
                )));
            };
            if !(skip_special && self.vocab.is_special(id)) {
                out.extend_from_slice(bytes);
            }
        }
        Ok(())
    }
}

/// Encodes a text that arrives in parts; what cannot be decided yet is held back.
#[derive(Debug)]
pub struct EncodeStream {
    encoder: Arc<Encoder>,
    splitter: Arc<Splitter>,
    special_ids: Arc<[TokenId]>,
    parts: SplitStream,
}

impl EncodeStream {
    /// Takes a part; appends the ids that it completes.
    pub fn push(&mut self, part: &str, out: &mut Vec<TokenId>) -> Result<()> {
        let Self { encoder, splitter, special_ids, parts } = self;
        encoder.with_scratch(|scratch| {
            let pushed = parts.push(splitter, part, |piece| encoder.piece(piece, special_ids, scratch, out));
            pushed.map(|()| encoder.flush(scratch, out))
        })
    }

    /// The text has ended: appends what was held back.
    pub fn finish(&mut self, out: &mut Vec<TokenId>) -> Result<()> {
        let Self { encoder, splitter, special_ids, parts } = self;
        let parts = std::mem::take(parts);
        encoder.with_scratch(|scratch| {
            let finished = parts.finish(splitter, |piece| encoder.piece(piece, special_ids, scratch, out));
            finished.map(|()| encoder.flush(scratch, out))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_words_keeps_to_its_bounds() {
        let mut scratch = Scratch::default();
        for n in 1..900_000u128 {
            scratch.remember(n << 8 | 4 << 120, &[n as TokenId, 1]);
            assert!(scratch.slots.len() <= MOST_SLOTS && scratch.used * 8 <= scratch.slots.len() * 5 + 8);
        }
        for n in 1..9_000u128 {
            scratch.remember(n << 64 | 5 << 120, &[7; 500]);
            assert!(scratch.spilled.len() < MOST_SPILLED + 500);
        }
        let slot = scratch.slots[scratch.find(8_999 << 64 | 5 << 120)];
        assert_eq!((slot.len, &scratch.spilled[slot.ids[0] as usize..][..500]), (500, &[7; 500][..]));
    }
}
