//! Words → ids, most of them by one look-up.
//!
//! In: words, many at a time. Out: ids. Called by `encode` with a [`Scratch`], the table of the words met so far.

use super::ids::{Id, Out};
use super::lockstep::{Miss, PLACES, TOGETHER};
use super::merge::{Buffers, Core};
use crate::error::Result;
use crate::hash::prefetch;
use crate::packed::{hash_packed, pack, pack_at};
use crate::pages;
use crate::pretokenize::Ends;
use crate::vocab::Vocab;

/// Lines of a new word table: few, since the first short text makes one, too.
const FIRST_LINES: usize = 1 << 9;
/// Lines of a word table that is full; it is emptied then, so its memory stays bounded.
const MOST_LINES: usize = 1 << 18;
/// Ids kept for words with more than a slot has room for, before the table is emptied.
const MOST_SPILLED: usize = 1 << 21;
/// Words that are looked up together.
const RUN: usize = 64;
/// Ids that are gathered before they are handed on: they stay in the first cache.
const GATHERED: usize = 1 << 12;
/// A longer word is not gathered.
const LONG: usize = 1 << 10;

/// A slot of the word table: 32 bytes.
#[derive(Debug, Clone, Copy)]
struct Slot<I: Id> {
    key: u128,
    /// Ids, and how many. Of a word whose key has [`SPILLED`] the first two say where they begin in `spilled`.
    row: I::Row,
}

/// Two slots, a cache line. Both are looked at without a branch: which of the two a word is in, no processor can foretell.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
struct Line<I: Id>([Slot<I>; 2]);

/// Of words that have more ids than a slot has room for, in their keys; so the quick way does not find them.
const SPILLED: u128 = 1 << 127;
/// Of a slot that is free. No word has it, nor has it 0, the key of words that are too long for one.
const FREE: u128 = 1;

/// What a thread works with: the table of words met so far and buffers. Bounded by [`MOST_LINES`].
#[derive(Debug)]
pub(super) struct Scratch<I: Id> {
    /// Open addressing by lines, at most five eighths full; in a line the first slot is taken first.
    lines: Vec<Line<I>>,
    used: usize,
    spilled: Vec<I>,
    buffers: Buffers<I>,
    gathered: Gathered<I>,
}

/// Ids in their order, with holes for those that are still to come.
#[derive(Debug)]
struct Gathered<I> {
    ids: Box<[I]>,
    len: usize,
    /// Behind how many ids, and what belongs there.
    holes: Vec<(usize, Hole)>,
    misses: Vec<Miss<I>>,
    /// Ids of longer words.
    extra: Vec<I>,
}

#[derive(Debug, Clone, Copy)]
enum Hole {
    /// The ids of a miss.
    Miss(usize),
    /// Some of `extra`.
    Extra(usize, usize),
}

impl<I: Id> Gathered<I> {
    fn extra(&mut self, ids: &[I]) {
        let from = self.extra.len();
        self.extra.extend_from_slice(ids);
        self.holes.push((self.len, Hole::Extra(from, self.extra.len())));
    }

    fn is_full(&self) -> bool {
        self.len + RUN * PLACES > GATHERED || self.extra.len() > GATHERED
    }
}

impl<I: Id> Default for Scratch<I> {
    fn default() -> Self {
        let gathered = Gathered {
            ids: vec![I::default(); GATHERED].into(),
            len: 0,
            holes: Vec::new(),
            misses: Vec::with_capacity(TOGETHER),
            extra: Vec::new(),
        };
        let (lines, buffers) = (vec![Self::FREE; FIRST_LINES], Buffers::default());
        Self { lines, used: 0, spilled: Vec::new(), buffers, gathered }
    }
}

impl<I: Id> Scratch<I> {
    const FREE: Line<I> = Line([Slot { key: FREE, row: I::FREE }; 2]);

    /// The slot of a word, or the free one where it belongs. `key` without [`SPILLED`].
    fn find(&mut self, key: u128) -> &mut Slot<I> {
        let mask = self.lines.len() - 1;
        let mut at = hash_packed(key) as usize & mask;
        let is_it = |slot: &Slot<I>| slot.key & !SPILLED == key || slot.key == FREE;
        let place = loop {
            match self.lines[at].0.iter().position(is_it) {
                Some(place) => break place,
                None => at = (at + 1) & mask,
            }
        };
        &mut self.lines[at].0[place]
    }

    /// Keeps the ids of a word.
    fn remember(&mut self, key: u128, ids: &[I]) {
        let full = self.used * 4 >= self.lines.len() * 5;
        if self.spilled.len() >= MOST_SPILLED || (full && self.lines.len() >= MOST_LINES) || (full && !self.grow()) {
            self.lines.fill(Self::FREE);
            self.spilled.clear();
            self.used = 0;
        }
        let (mut row, mut kept) = (I::Row::default(), key);
        let (place, number) = row.as_mut().split_at_mut(I::ROW - 1);
        number[0] = I::of(ids.len() as u32);
        if ids.len() < I::ROW {
            place[..ids.len()].copy_from_slice(ids);
        } else {
            let at = self.spilled.len() as u32;
            (place[0], place[1]) = (I::of(at & 0xffff), I::of(at >> 16));
            kept |= SPILLED;
        }
        let slot = self.find(key);
        if slot.key != FREE {
            // It was missed several times before it came.
            return;
        }
        *slot = Slot { key: kept, row };
        self.used += 1;
        if kept != key {
            self.spilled.extend_from_slice(ids);
        }
    }

    /// Four times as many slots; `false` where there is no memory for them.
    fn grow(&mut self) -> bool {
        let size = (self.lines.len() * 4).min(MOST_LINES);
        let mut bigger = Vec::new();
        if bigger.try_reserve_exact(size).is_err() {
            return false;
        }
        pages::large(&bigger);
        bigger.resize(size, Self::FREE);
        let old = std::mem::replace(&mut self.lines, bigger);
        for slot in old.into_iter().flat_map(|line| line.0).filter(|slot| slot.key != FREE) {
            *self.find(slot.key & !SPILLED) = slot;
        }
        true
    }

    /// Gathers the ids of words until one is not found where it is looked for first; how many that are.
    #[inline]
    fn known(&mut self, words: &[(u128, usize)]) -> usize {
        let Self { lines, gathered: Gathered { ids, len, .. }, .. } = self;
        let (mask, mut at) = (lines.len() - 1, *len);
        let mut known = 0;
        for &(key, line) in words {
            // The table may have grown since, and lines be elsewhere: then they do not have the key.
            let line = &lines[line & mask].0;
            let slot = &line[usize::from(line[1].key == key)];
            let row = slot.row.as_ref();
            if slot.key != key {
                break;
            }
            ids[at..at + I::ROW].copy_from_slice(row);
            at += row[I::ROW - 1].place();
            known += 1;
        }
        *len = at;
        known
    }

    /// Forgets what an error left.
    pub(super) fn forget(&mut self) {
        let Gathered { len, holes, misses, extra, .. } = &mut self.gathered;
        *len = 0;
        holes.clear();
        misses.clear();
        extra.clear();
    }
}

/// Ids of a word that has more of them than its slot holds.
fn spilled<'s, I: Id>(spilled: &'s [I], row: &I::Row) -> &'s [I] {
    let row = row.as_ref();
    let at = row[0].place() | row[1].place() << 16;
    &spilled[at..at + row[I::ROW - 1].place()]
}

impl<I: Id> Core<I> {
    /// Takes the words of `text` that end at `ends`.
    ///
    /// The slots of a batch are asked for before the first of them is looked at: the table is larger than the caches,
    /// and so the waits overlap. A row is stored whole, and the next one over what was too much of it.
    pub(super) fn run(
        &self,
        vocab: &Vocab,
        text: &[u8],
        ends: &Ends<'_>,
        scratch: &mut Scratch<I>,
        out: &mut impl Out,
    ) -> Result<()> {
        let mut start = ends.start;
        let mut batch = [(0, 0); RUN];
        for offsets in ends.offsets.chunks(RUN) {
            if scratch.gathered.is_full() {
                self.hand_on(scratch, out)?;
            }
            let mut from = start;
            let lines = &scratch.lines[..];
            let mask = lines.len() - 1;
            for (word, &offset) in batch.iter_mut().zip(offsets) {
                let end = ends.base.wrapping_add(offset as usize);
                let key = pack_at(text, from, end.wrapping_sub(from));
                let at = hash_packed(key) as usize & mask;
                prefetch(lines, at);
                *word = (key, at);
                from = end;
            }
            let mut done = 0;
            while done < offsets.len() {
                done += scratch.known(&batch[done..offsets.len()]);
                // The one that was not found at once; others may be found after it.
                if let Some(&offset) = offsets.get(done) {
                    let begin = done.checked_sub(1).map_or(start, |n| ends.base.wrapping_add(offsets[n] as usize));
                    let word = &text[begin..ends.base.wrapping_add(offset as usize)];
                    self.other_word(vocab, word, batch[done].0, scratch, out)?;
                    done += 1;
                }
            }
            start = from;
        }
        Ok(())
    }

    /// Takes one word.
    pub(super) fn word(&self, vocab: &Vocab, word: &[u8], scratch: &mut Scratch<I>, out: &mut impl Out) -> Result<()> {
        if scratch.gathered.is_full() {
            self.hand_on(scratch, out)?;
        }
        self.other_word(vocab, word, pack(word).unwrap_or_default(), scratch, out)
    }

    /// Takes an id that is no word's.
    pub(super) fn id(&self, id: I, scratch: &mut Scratch<I>, out: &mut impl Out) -> Result<()> {
        if scratch.gathered.is_full() {
            self.hand_on(scratch, out)?;
        }
        scratch.gathered.ids[scratch.gathered.len] = id;
        scratch.gathered.len += 1;
        Ok(())
    }

    /// Any word: long, met before, or new.
    fn other_word(
        &self,
        vocab: &Vocab,
        word: &[u8],
        key: u128,
        scratch: &mut Scratch<I>,
        out: &mut impl Out,
    ) -> Result<()> {
        if word.len() > LONG {
            self.hand_on(scratch, out)?;
            self.merge(word, vocab, &mut scratch.buffers)?;
            return I::put(&scratch.buffers.ids, out).inspect(|()| scratch.buffers.shrink());
        }
        if key == 0 {
            self.merge(word, vocab, &mut scratch.buffers)?;
            scratch.gathered.extra(&scratch.buffers.ids);
            return Ok(());
        }
        let slot = *scratch.find(key);
        if slot.key != FREE {
            let (row, Gathered { ids, len, .. }) = (slot.row.as_ref(), &mut scratch.gathered);
            let number = row[I::ROW - 1].place();
            let known = if slot.key == key { row } else { spilled(&scratch.spilled, &slot.row) };
            ids[*len..*len + number].copy_from_slice(&known[..number]);
            *len += number;
        } else if self.has_results && !vocab.ignore_merges() {
            let Gathered { len, holes, misses, .. } = &mut scratch.gathered;
            holes.push((*len, Hole::Miss(misses.len())));
            misses.push(self.begin(key));
            if misses.len() == TOGETHER {
                self.hand_on(scratch, out)?;
            }
        } else {
            self.merge(word, vocab, &mut scratch.buffers)?;
            let ids = std::mem::take(&mut scratch.buffers.ids);
            scratch.gathered.extra(&ids);
            scratch.remember(key, &ids);
            scratch.buffers.ids = ids;
        }
        Ok(())
    }

    /// Merges the misses and appends all that is gathered.
    pub(super) fn hand_on(&self, scratch: &mut Scratch<I>, out: &mut impl Out) -> Result<()> {
        let mut misses = std::mem::take(&mut scratch.gathered.misses);
        self.finish(&mut misses);
        let Gathered { ids, len, holes, extra, .. } = &mut scratch.gathered;
        let mut from = 0;
        for &(to, hole) in &*holes {
            I::put(&ids[from..to], out)?;
            match hole {
                Hole::Miss(n) => I::put(&misses[n].ids[..misses[n].len()], out)?,
                Hole::Extra(from, to) => I::put(&extra[from..to], out)?,
            }
            from = to;
        }
        I::put(&ids[from..*len], out)?;
        *len = 0;
        holes.clear();
        extra.clear();
        for miss in &misses {
            scratch.remember(miss.key, &miss.ids[..miss.len()]);
        }
        misses.clear();
        scratch.gathered.misses = misses;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keeps_to_its_bounds<I: Id>() {
        let mut scratch = Scratch::<I>::default();
        for n in 1..900_000u128 {
            scratch.remember(n << 8 | 4 << 120, &[I::of(n as u32), I::of(1)]);
            assert!(scratch.lines.len() <= MOST_LINES && scratch.used * 4 <= scratch.lines.len() * 5 + 4);
        }
        for n in 1..9_000u128 {
            scratch.remember(n << 64 | 5 << 120, &[I::of(7); 500]);
            assert!(scratch.spilled.len() < MOST_SPILLED + 500);
        }
        let key = 8_999 << 64 | 5 << 120;
        let slot = *scratch.find(key);
        assert_eq!((slot.key, spilled(&scratch.spilled, &slot.row)), (key | SPILLED, &[I::of(7); 500][..]));
    }

    #[test]
    fn the_table_of_words_keeps_to_its_bounds() {
        keeps_to_its_bounds::<u16>();
        keeps_to_its_bounds::<u32>();
    }
}
