//! The table of the words met so far and their ids, which each thread has one of.
//!
//! In: keys of words. Out: ids. Called by `words`. Bounded: it is emptied when it is full.

use bytekiln_simd::Level;

use super::ids::Id;
use crate::hash::prefetch;
use crate::packed::{Hasher, Keys};
use crate::pages;
use crate::pretokenize::Ends;

/// Words that are looked up together.
pub(super) const RUN: usize = 128;
/// Lines of a new table: few, since the first short text makes one, too.
const FIRST_LINES: usize = 1 << 9;
/// Lines of a table that is full; it is emptied then, so its memory stays bounded.
const MOST_LINES: usize = 1 << 18;
/// Ids kept for words with more than a slot has room for, before the table is emptied.
const MOST_SPILLED: usize = 1 << 21;

/// Lines that a look-up may pass over, as a mean, and so many on top of that once. A table is at most five eighths full, so that words
/// of a language pass over less than one; words that were chosen to share a place would pass over thousands each.
const MOST_WALKED: u64 = 32;
const WALKED_ONCE: u64 = 4096;

/// Two slots, a cache line. Both are looked at without a branch: which of the two a word is in, no processor can foretell.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line<I: Id> {
    keys: [u128; 2],
    /// Ids, and how many. Of a word whose key has [`SPILLED`] the first two say where they begin in `spilled`.
    rows: [I::Row; 2],
}

/// Of words that have more ids than a slot has room for, in their keys; so the quick way does not find them.
const SPILLED: u128 = 1 << 127;
/// Of words whose ids are still to come, the same.
const AWAITED: u128 = 1 << 126;
/// Of a slot that is free. No word has it, nor has it 0, the key of words that are too long for one.
const FREE: u128 = 1;

/// Where a word has its slot, unless it was moved.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Place {
    line: u32,
    slot: u32,
}

/// A word that the quick way did not find.
pub(super) enum Met<'t, I: Id> {
    /// Its ids, and how many: whole, since a copy of one size is a move and one of any size a call.
    Row(&'t I::Row),
    /// Its ids, more than a row holds.
    Many(&'t [I]),
    /// Its ids are still to come: the number of its miss.
    Awaited(usize),
    /// Where to keep its ids.
    Never(Place),
}

/// Open addressing by lines, at most five eighths full; in a line the first slot is taken first.
#[derive(Debug)]
pub(super) struct Table<I: Id> {
    lines: Vec<Line<I>>,
    hasher: Hasher,
    used: usize,
    spilled: Vec<I>,
    /// Words that [`Self::meet`] has looked for since the table last grew or was emptied, and lines passed over for them.
    met: u64,
    walked: u64,
}

impl<I: Id> Table<I> {
    const FREE: Line<I> = Line { keys: [FREE; 2], rows: [I::FREE; 2] };

    pub(super) fn new(level: Level) -> Self {
        let lines = vec![Self::FREE; FIRST_LINES];
        Self { lines, hasher: Hasher::new(level, 0), used: 0, spilled: Vec::new(), met: 0, walked: 0 }
    }

    /// How many lines there are: what [`Self::keys`] has found holds while there are as many.
    #[inline]
    pub(super) fn size(&self) -> usize {
        self.lines.len()
    }

    /// The keys of at most [`RUN`] words, and in which lines they are looked for first, which are asked for or not. Returns
    /// the end of the last word.
    #[inline]
    pub(super) fn keys<const ASK: bool>(&self, text: &[u8], ends: &Ends<'_>, to: &mut Keys<RUN, 1>) -> usize {
        self.hasher.keys::<ASK, _, _, _>(text, ends, &self.lines, to)
    }

    /// The lines of the same words, after the table has grown.
    #[cold]
    pub(super) fn find_places(&self, words: &mut Keys<RUN, 1>) {
        for (&key, place) in words.keys.iter().zip(&mut words.places) {
            *place = (self.place(key) * size_of::<Line<I>>()) as u32;
        }
    }

    /// The line in which a key is looked for first.
    #[inline]
    fn place(&self, key: u128) -> usize {
        self.hasher.place(key, self.lines.len())
    }

    /// Where a word is, or the free slot where it belongs. `key` without [`SPILLED`] and [`AWAITED`]; it is looked for in line
    /// `at` first.
    #[inline]
    fn find(&self, key: u128, mut at: usize) -> (usize, usize) {
        let mask = self.lines.len() - 1;
        loop {
            // Both at once: in which of them it is no processor can foretell.
            let is_it = |slot: u128| u32::from(slot & !(SPILLED | AWAITED) == key) | u32::from(slot == FREE);
            let [first, second] = self.lines[at].keys;
            let found = is_it(first) | is_it(second) << 1;
            if found != 0 {
                return (at, found.trailing_zeros() as usize);
            }
            at = (at + 1) & mask;
        }
    }

    /// A word that is not where it is looked for first, or has too many ids for a slot, or was not met yet: then it has a
    /// slot from now on, and `miss` is the number that [`Met::Awaited`] tells of it.
    ///
    /// A word of another line is moved to the second slot of its first one: words that occur often end up where they are
    /// looked for first. Every line that is passed over is full, and so is the one that what was in its way comes into.
    #[inline]
    pub(super) fn meet(&mut self, key: u128, miss: usize) -> Met<'_, I> {
        let mut first = self.place(key);
        let (mut line, mut slot) = self.find(key, first);
        self.met += 1;
        self.walked += (line.wrapping_sub(first) & (self.lines.len() - 1)) as u64;
        if self.walked > MOST_WALKED * self.met + WALKED_ONCE {
            self.begin_anew();
            first = self.place(key);
            (line, slot) = self.find(key, first);
        }
        let found = self.lines[line].keys[slot];
        if found == FREE {
            if self.used * 4 >= self.lines.len() * 5 {
                if self.lines.len() >= MOST_LINES || !self.grow() {
                    self.forget();
                }
                (line, slot) = self.find(key, self.place(key));
            }
            self.lines[line].keys[slot] = key | AWAITED;
            self.lines[line].rows[slot].as_mut()[0] = I::of(miss as u32);
            self.used += 1;
            return Met::Never(Place { line: line as u32, slot: slot as u32 });
        }
        if line != first {
            let there = self.lines[first];
            let here = &mut self.lines[line];
            let moved = (std::mem::replace(&mut here.keys[slot], there.keys[1]), here.rows[slot]);
            here.rows[slot] = there.rows[1];
            (self.lines[first].keys[1], self.lines[first].rows[1]) = moved;
            (line, slot) = (first, 1);
        }
        let whole = &self.lines[line].rows[slot];
        let row = whole.as_ref();
        if found == key {
            Met::Row(whole)
        } else if found & AWAITED != 0 {
            Met::Awaited(row[0].place())
        } else {
            let at = row[0].place() | row[1].place() << 16;
            Met::Many(&self.spilled[at..at + row[I::ROW - 1].place()])
        }
    }

    /// The ids of a word that was awaited.
    pub(super) fn keep(&mut self, key: u128, mut place: Place, ids: &[I]) {
        if self.lines.get(place.line as usize).is_none_or(|line| line.keys[place.slot as usize] != key | AWAITED) {
            // It was moved, or all is forgotten.
            let (line, slot) = self.find(key, self.place(key));
            if self.lines[line].keys[slot] == FREE {
                return;
            }
            (place.line, place.slot) = (line as u32, slot as u32);
        }
        let (line, slot) = (&mut self.lines[place.line as usize], place.slot as usize);
        let row = line.rows[slot].as_mut();
        row[I::ROW - 1] = I::of(ids.len() as u32);
        if ids.len() < I::ROW {
            line.keys[slot] = key;
            row[..ids.len()].copy_from_slice(ids);
        } else {
            let at = self.spilled.len() as u32;
            line.keys[slot] = key | SPILLED;
            (row[0], row[1]) = (I::of(at & 0xffff), I::of(at >> 16));
            self.spilled.extend_from_slice(ids);
        }
    }

    /// Empties the table if there is too much in it that has no room in slots. No word is awaited.
    #[inline]
    pub(super) fn keep_to_bounds(&mut self) {
        if self.spilled.len() >= MOST_SPILLED {
            self.forget();
        }
    }

    /// Empties the table.
    pub(super) fn forget(&mut self) {
        self.lines.fill(Self::FREE);
        self.spilled.clear();
        (self.used, self.met, self.walked) = (0, 0, 0);
    }

    /// Empties the table and makes it small, so that no way through it is long.
    #[cold]
    fn begin_anew(&mut self) {
        self.lines.truncate(FIRST_LINES);
        self.forget();
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
        for old in std::mem::replace(&mut self.lines, bigger) {
            for (key, row) in old.keys.into_iter().zip(old.rows).filter(|&(key, _)| key != FREE) {
                let alone = key & !(SPILLED | AWAITED);
                let (line, slot) = self.find(alone, self.place(alone));
                (self.lines[line].keys[slot], self.lines[line].rows[slot]) = (key, row);
            }
        }
        (self.met, self.walked) = (0, 0);
        true
    }

    /// Writes the ids of words to `ids` until one is not found where it is looked for first. How many words, and how many ids.
    /// For each one word of `next` is asked for: all at once they would wait for each other.
    ///
    /// A row is stored whole, and the next one over what was too much of it.
    ///
    /// # Panics
    /// Where there is no room for [`Id::ROW`] ids a word.
    #[inline]
    pub(super) fn known(
        &self,
        words: &Keys<RUN, 1>,
        next: &Keys<RUN, 1>,
        from: usize,
        to: usize,
        ids: &mut [I],
    ) -> (usize, usize) {
        assert!(ids.len() >= to.saturating_sub(from) * I::ROW);
        let (keys, places) = (&words.keys[from..to], &words.places[from..to]);
        let next = &next.places[from..to];
        match self.hasher.level() {
            // SAFETY: the level says that the processor has the instructions; there is room for all ids; lines are made by
            // `new` and `grow`, and rows filled by `keep`, which leave a longer one out.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 | Level::Avx512 | Level::Avx512Vbmi2 => unsafe {
                x86::known(&self.lines, keys, (places, next), ids)
            },
            _ => known_plainly(&self.lines, keys, (places, next), ids),
        }
    }

    #[cfg(test)]
    fn keeps_to_its_bounds(&self) {
        assert!(self.lines.len() <= MOST_LINES && self.used * 4 <= self.lines.len() * 5 + 4);
        assert!(self.spilled.len() < MOST_SPILLED + 500);
    }
}

/// [`Table::known`], for any processor.
fn known_plainly<I: Id>(
    lines: &[Line<I>],
    keys: &[u128],
    (places, next): (&[u32], &[u32]),
    ids: &mut [I],
) -> (usize, usize) {
    let mut at = 0;
    for (n, ((&key, &place), &next)) in keys.iter().zip(places).zip(next).enumerate() {
        prefetch(lines, next as usize / size_of::<Line<I>>());
        let line = &lines[place as usize / size_of::<Line<I>>()];
        let slot = usize::from(line.keys[1] == key);
        if line.keys[slot] != key {
            return (n, at);
        }
        let row = line.rows[slot].as_ref();
        ids[at..at + I::ROW].copy_from_slice(row);
        at += row[I::ROW - 1].place();
    }
    (keys.len(), at)
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "vector instructions; held to the plain loop by a property test")]
mod x86 {
    use std::arch::x86_64::{
        _MM_HINT_T0, _mm_loadu_si128, _mm_prefetch, _mm_storeu_si128, _mm256_broadcastsi128_si256, _mm256_castsi256_pd,
        _mm256_cmpeq_epi64, _mm256_load_si256, _mm256_movemask_pd,
    };

    use super::{Id, Line};

    /// # Safety
    /// There is room for [`Id::ROW`] ids a word. There are lines, a power of two of them, and no row says that it holds more ids
    /// than it has room for.
    #[target_feature(enable = "avx2,bmi1,bmi2")]
    pub(super) unsafe fn known<I: Id>(
        lines: &[Line<I>],
        keys: &[u128],
        (places, next): (&[u32], &[u32]),
        ids: &mut [I],
    ) -> (usize, usize) {
        let (mask, begin) = (size_of_val(lines).wrapping_sub(size_of::<Line<I>>()), ids.as_mut_ptr());
        let mut to = begin;
        let number = keys.len().min(places.len()).min(next.len());
        let mut n = 0;
        while n < number {
            // SAFETY: lines are a power of two, and so many bytes; `n` is less than both lengths; a line is aligned, keys first.
            let (line, both) = unsafe {
                let asked = lines.as_ptr().wrapping_byte_add(*next.get_unchecked(n) as usize);
                _mm_prefetch::<_MM_HINT_T0>(asked.cast());
                let line = lines.as_ptr().byte_add(*places.get_unchecked(n) as usize & mask);
                let key = _mm256_broadcastsi128_si256(_mm_loadu_si128(keys.as_ptr().add(n).cast()));
                let halves = _mm256_cmpeq_epi64(_mm256_load_si256(line.cast()), key);
                let halves = _mm256_movemask_pd(_mm256_castsi256_pd(halves)).cast_unsigned();
                (line, halves & halves >> 1)
            };
            if both & 0b101 == 0 {
                break;
            }
            // SAFETY: a row is 16 bytes, those of slot 0 first; a word has at most as many ids as a row has places, so
            // there is room as the caller says.
            unsafe {
                let row = std::ptr::from_ref(&(*line).rows).cast::<u8>().add((both as usize & 0b100) * 4);
                _mm_storeu_si128(to.cast(), _mm_loadu_si128(row.cast()));
                // Read back from memory: to take a register apart is dearer.
                to = to.add(row.cast::<I>().add(I::ROW - 1).read_volatile().place());
            }
            n = n.wrapping_add(1);
        }
        // SAFETY: both are in `ids`.
        (n, unsafe { to.offset_from_unsigned(begin) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packed::pack;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// Words with as many ids as they have bytes, met in runs: each is found with the ids that it came with.
    fn holds<I: Id>(level: Level, words: &[String]) {
        let mut table = Table::<I>::new(level);
        let mut kept: BTreeMap<&String, Vec<I>> = BTreeMap::new();
        for run in words.chunks(RUN) {
            let text = run.concat() + &" ".repeat(16);
            let offsets: Vec<u32> = run
                .iter()
                .scan(0, |end, word| {
                    *end += word.len() as u32;
                    Some(*end)
                })
                .collect();
            let mut keys = Keys::<RUN, 1>::default();
            let ends = Ends { start: 0, base: 0, offsets: &offsets };
            table.keys::<true>(text.as_bytes(), &ends, &mut keys);
            let (mut ids, mut plain) = (vec![I::NONE; RUN * I::ROW], vec![I::NONE; RUN * I::ROW]);
            for from in 0..run.len() {
                let found = table.known(&keys, &keys, from, run.len(), &mut ids);
                let (keys, places) = (&keys.keys[from..run.len()], &keys.places[from..run.len()]);
                assert_eq!(found, known_plainly(&table.lines, keys, (places, places), &mut plain), "{}", level.name());
                assert_eq!(ids[..found.1], plain[..found.1]);
                let expected: Vec<I> = run[from..from + found.0].iter().flat_map(|w| kept[w].iter().copied()).collect();
                assert_eq!(ids[..found.1], expected);
            }
            for (n, word) in run.iter().enumerate() {
                let key = keys.keys[n];
                assert_eq!(key, pack(word.as_bytes()).unwrap());
                let place = match table.meet(key, n) {
                    Met::Row(_) | Met::Many(_) => {
                        assert_eq!(met(&mut table, key).unwrap(), kept[word]);
                        continue;
                    }
                    Met::Awaited(_) => panic!("{word} is kept at once"),
                    Met::Never(place) => place,
                };
                assert!(matches!(table.meet(key, 0), Met::Awaited(miss) if miss == n));
                let ids: Vec<I> = word.bytes().map(|byte| I::of(byte.into())).collect();
                table.keep(key, place, &ids);
                assert!(kept.insert(word, ids).is_none(), "{word} was forgotten");
            }
        }
    }

    proptest! {
        #[test]
        fn every_level_finds_what_was_kept(words in prop::collection::vec("[ab]{1,15}|[a-f]{1,3}", 1..4000)) {
            for level in Level::ALL.into_iter().filter(|level| level.is_here()) {
                holds::<u16>(level, &words);
                holds::<u32>(level, &words);
            }
        }
    }

    /// The ids of a word that is in the table.
    fn met<I: Id>(table: &mut Table<I>, key: u128) -> Option<Vec<I>> {
        match table.meet(key, 0) {
            Met::Row(row) => Some(row.as_ref()[..row.as_ref()[I::ROW - 1].place()].to_vec()),
            Met::Many(ids) => Some(ids.to_vec()),
            _ => None,
        }
    }

    fn keep<I: Id>(table: &mut Table<I>, key: u128, ids: &[I]) {
        if let Met::Never(place) = table.meet(key, 0) {
            table.keep(key, place, ids);
        }
        table.keep_to_bounds();
    }

    fn keeps_to_its_bounds<I: Id>() {
        let mut table = Table::<I>::new(Level::of_process().unwrap());
        for n in 1..900_000u128 {
            keep(&mut table, n << 8 | 4 << 120, &[I::of(n as u32), I::of(1)]);
            table.keeps_to_its_bounds();
        }
        for n in 1..9_000u128 {
            keep(&mut table, n << 64 | 5 << 120, &[I::of(7); 500]);
            table.keeps_to_its_bounds();
        }
        let key = 8_999 << 64 | 5 << 120;
        assert_eq!(met(&mut table, key).unwrap(), [I::of(7); 500]);
    }

    /// Words of one place: two rounds of AES carry these four bytes into one byte of the place, and a half of a number that
    /// the other hash multiplies by nothing hides the other half.
    fn of_one_place(hasher: Hasher) -> Vec<u128> {
        let letters = |n: u128| [n % 26, n / 26 % 26, n / 676 % 26, n / 17576 % 26].map(|letter| 97 + letter);
        let keys = (0..26u128.pow(4)).map(|n| {
            let [a, b, c, d] = letters(n);
            let spread = a << 24 | b << 32 | c << 72 | d << 112;
            let nothing = 0x9e37_79b9_7f4a_7c15 | n << 64;
            15 << 120 | if matches!(hasher.level(), Level::Scalar) { nothing } else { spread }
        });
        let place = hasher.place(keys.clone().next().unwrap(), MOST_LINES);
        keys.filter(|&key| hasher.place(key, MOST_LINES) == place).collect()
    }

    #[test]
    fn words_that_share_a_place_do_not_make_every_look_up_a_search() {
        for level in Level::ALL.into_iter().filter(|level| level.is_here()) {
            let keys = of_one_place(Hasher::new(level, 0));
            assert!(keys.len() > 1000, "{} of one place at {}", keys.len(), level.name());
            let (mut table, mut walked, mut met) = (Table::<u16>::new(level), 0, 0u64);
            // Beside words of a language, which make the table large.
            for n in 0..20_000 {
                keep(&mut table, n << 8 | 4 << 120, &[1]);
            }
            for &key in keys.iter().cycle().take(50_000) {
                let first = table.place(key);
                walked += (table.find(key, first).0.wrapping_sub(first) & (table.lines.len() - 1)) as u64;
                met += 1;
                match table.meet(key, 0) {
                    Met::Row(row) => assert_eq!((&row[..2], row[7]), (&[2, 3][..], 2)),
                    Met::Many(_) => panic!("two ids fit into a row"),
                    Met::Awaited(_) => panic!("it is kept at once"),
                    Met::Never(place) => table.keep(key, place, &[2, 3]),
                }
            }
            assert!(walked < 80 * met, "{walked} lines for {met} words at {}", level.name());
        }
    }

    #[test]
    fn the_table_keeps_to_its_bounds() {
        keeps_to_its_bounds::<u16>();
        keeps_to_its_bounds::<u32>();
    }
}
