//! Words → ids, most of them by one look-up.
//!
//! In: words, many at a time. Out: ids. Called by `encode` with a [`Scratch`], the table of the words met so far.

use bytekiln_simd::Level;

use super::ids::{Id, Out};
use super::lockstep::{Miss, PLACES, TOGETHER};
use super::merge::{Buffers, Core};
use super::table::{Met, RUN, Table};
use super::window::{WINDOW, WINDOWS, Window};
use crate::error::Result;
use crate::packed::{Keys, pack, packed_len};
use crate::pretokenize::Ends;
use crate::vocab::Vocab;

/// Ids that are gathered before they are handed on: they stay in the first cache.
const GATHERED: usize = 1 << 14;
/// Places that are left open; a new word that is repeated and repeated leaves one each time.
const MOST_HOLES: usize = 1 << 10;
/// A longer word is not gathered.
const LONG: usize = 1 << 10;

/// What a thread works with: the table of words met so far and buffers.
#[derive(Debug)]
pub(super) struct Scratch<I: Id> {
    table: Table<I>,
    /// Of the words that are looked up, and of those that follow them.
    keys: Box<Keys<RUN, 1>>,
    next: Box<Keys<RUN, 1>>,
    buffers: Buffers<I>,
    gathered: Gathered<I>,
}

/// Ids in their order, with holes for those that are still to come.
#[derive(Debug)]
struct Gathered<I: Id> {
    ids: Box<[I]>,
    len: usize,
    /// Behind how many ids, and what belongs there.
    holes: Vec<(usize, Hole)>,
    misses: Vec<Miss<I>>,
    /// Words that are too long for a key, and the numbers of their holes.
    windows: Vec<Window<I>>,
    of_windows: Vec<usize>,
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

    /// Merges the windows.
    fn close(&mut self, core: &Core<I>) {
        core.merge_windows(&mut self.windows);
        for (window, number) in self.windows.drain(..).zip(self.of_windows.drain(..)) {
            let from = self.extra.len();
            self.extra.extend(window.ids());
            self.holes[number].1 = Hole::Extra(from, self.extra.len());
        }
    }

    fn is_full(&self) -> bool {
        self.len + RUN * PLACES > GATHERED || self.extra.len() > GATHERED || self.holes.len() > MOST_HOLES
    }
}

impl<I: Id> Scratch<I> {
    pub(super) fn new(level: Level) -> Self {
        let gathered = Gathered {
            ids: vec![I::default(); GATHERED].into(),
            len: 0,
            holes: Vec::new(),
            misses: Vec::with_capacity(TOGETHER),
            windows: Vec::with_capacity(WINDOWS),
            of_windows: Vec::with_capacity(WINDOWS),
            extra: Vec::new(),
        };
        Self {
            table: Table::new(level),
            keys: Box::default(),
            next: Box::default(),
            buffers: Buffers::default(),
            gathered,
        }
    }

    /// Forgets what an error left.
    pub(super) fn forget(&mut self) {
        let Gathered { len, holes, misses, windows, of_windows, extra, .. } = &mut self.gathered;
        *len = 0;
        holes.clear();
        misses.clear();
        windows.clear();
        of_windows.clear();
        extra.clear();
        // Some of its words may still be awaited.
        self.table.forget();
    }
}

impl<I: Id> Core<I> {
    /// Takes the words of `text` that end at `ends`.
    ///
    /// The lines of a batch are asked for while the batch before it is looked up: the table is larger than the caches, and so
    /// the waits overlap.
    pub(super) fn run(
        &self,
        vocab: &Vocab,
        text: &[u8],
        ends: &Ends<'_>,
        scratch: &mut Scratch<I>,
        out: &mut impl Out,
    ) -> Result<()> {
        let batch = |start, number: usize| {
            let offsets = ends.offsets.get(number * RUN..).unwrap_or_default();
            Ends { start, offsets: &offsets[..offsets.len().min(RUN)], ..*ends }
        };
        let mut now = batch(ends.start, 0);
        let mut end = scratch.table.keys::<true>(text, &now, &mut scratch.keys);
        for number in 1..=ends.offsets.len().div_ceil(RUN) {
            if scratch.gathered.is_full() {
                self.hand_on(vocab, scratch, out)?;
            }
            let next = batch(end, number);
            end = scratch.table.keys::<false>(text, &next, &mut scratch.next);
            let mut done = 0;
            while done < now.offsets.len() {
                let Scratch { table, keys, next, gathered: Gathered { ids, len, .. }, .. } = &mut *scratch;
                let (words, found) = table.known(keys, next, done, now.offsets.len(), &mut ids[*len..]);
                (done, *len) = (done + words, *len + found);
                // The one that was not found at once; others may be found after it.
                if let Some(&offset) = now.offsets.get(done) {
                    let size = table.size();
                    let begin =
                        done.checked_sub(1).map_or(now.start, |n| ends.base.wrapping_add(now.offsets[n] as usize));
                    let word = &text[begin..ends.base.wrapping_add(offset as usize)];
                    self.other_word(vocab, word, scratch.keys.keys[done], scratch, out)?;
                    if scratch.table.size() != size {
                        scratch.table.find_places(&mut scratch.keys);
                        scratch.table.find_places(&mut scratch.next);
                    }
                    done += 1;
                }
            }
            std::mem::swap(&mut scratch.keys, &mut scratch.next);
            now = next;
        }
        Ok(())
    }

    /// Takes one word.
    pub(super) fn word(&self, vocab: &Vocab, word: &[u8], scratch: &mut Scratch<I>, out: &mut impl Out) -> Result<()> {
        if scratch.gathered.is_full() {
            self.hand_on(vocab, scratch, out)?;
        }
        self.other_word(vocab, word, pack(word).unwrap_or_default(), scratch, out)
    }

    /// Takes an id that is no word's.
    pub(super) fn id(&self, vocab: &Vocab, id: I, scratch: &mut Scratch<I>, out: &mut impl Out) -> Result<()> {
        if scratch.gathered.is_full() {
            self.hand_on(vocab, scratch, out)?;
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
            self.hand_on(vocab, scratch, out)?;
            self.merge(word, vocab, &mut scratch.buffers)?;
            return I::put(&scratch.buffers.ids, out).inspect(|()| scratch.buffers.shrink());
        }
        if key == 0 && word.len() <= WINDOW && self.has_results && !vocab.looks_for_words() {
            let gathered = &mut scratch.gathered;
            gathered.of_windows.push(gathered.holes.len());
            gathered.extra(&[]);
            gathered.windows.push(self.open(word));
            if gathered.windows.len() == WINDOWS {
                gathered.close(self);
            }
            return Ok(());
        }
        if key == 0 {
            self.merge(word, vocab, &mut scratch.buffers)?;
            scratch.gathered.extra(&scratch.buffers.ids);
            return Ok(());
        }
        let Scratch { table, gathered: Gathered { ids, len, holes, misses, .. }, .. } = &mut *scratch;
        match table.meet(key, misses.len()) {
            Met::Row(row) => {
                let row = row.as_ref();
                ids[*len..*len + I::ROW].copy_from_slice(row);
                *len += row[I::ROW - 1].place();
            }
            Met::Many(known) => {
                ids[*len..*len + known.len()].copy_from_slice(known);
                *len += known.len();
            }
            Met::Awaited(miss) => holes.push((*len, Hole::Miss(miss))),
            Met::Never(place) if self.has_results => {
                holes.push((*len, Hole::Miss(misses.len())));
                misses.push(self.begin(key, place));
                if misses.len() == TOGETHER {
                    self.hand_on(vocab, scratch, out)?;
                }
            }
            Met::Never(place) => {
                self.merge(word, vocab, &mut scratch.buffers)?;
                scratch.table.keep(key, place, &scratch.buffers.ids);
                scratch.gathered.extra(&scratch.buffers.ids);
            }
        }
        Ok(())
    }

    /// Merges the misses and appends all that is gathered.
    pub(super) fn hand_on(&self, vocab: &Vocab, scratch: &mut Scratch<I>, out: &mut impl Out) -> Result<()> {
        scratch.gathered.close(self);
        let mut misses = std::mem::take(&mut scratch.gathered.misses);
        self.finish(&mut misses);
        if vocab.looks_for_words() {
            // What the merges have made one token of is that token.
            for miss in misses.iter_mut().filter(|miss| miss.ids().len() > 1) {
                if let Some(id) = vocab.id_of(&miss.key.to_le_bytes()[..packed_len(miss.key)]) {
                    miss.replace(I::of(id));
                }
            }
        }
        let Gathered { ids, len, holes, extra, .. } = &mut scratch.gathered;
        let mut from = 0;
        for &(to, hole) in &*holes {
            I::put(&ids[from..to], out)?;
            match hole {
                Hole::Miss(n) => I::put(misses[n].ids(), out)?,
                Hole::Extra(from, to) => I::put(&extra[from..to], out)?,
            }
            from = to;
        }
        I::put(&ids[from..*len], out)?;
        *len = 0;
        holes.clear();
        extra.clear();
        for miss in &misses {
            scratch.table.keep(miss.key, miss.place, miss.ids());
        }
        scratch.table.keep_to_bounds();
        misses.clear();
        scratch.gathered.misses = misses;
        Ok(())
    }
}
