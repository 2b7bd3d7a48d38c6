//! Text, 64 bytes at a time: classes as masks, borders by a pattern's algebra on them, borders as numbers.
//!
//! In: valid UTF-8. Out: the ends of its pre-tokens, many at a time. A pattern is a type of [`Rules`].

use super::classes::{CLASSES, Class, Classes, classes};
use super::lanes::{BLOCK, Lanes};
use crate::hash::prefetch;

/// A block, and what is looked at behind it: two bytes for contractions, one character for white space.
const WINDOW: usize = BLOCK + 8;

/// Bytes that are asked for ahead.
const AHEAD: usize = 1024;

/// What is done with ends: a base, and what to add to it for each of them.
pub(super) type Hand<'f> = &'f mut dyn FnMut(usize, &[u32]);

/// A pattern. The value is what the blocks so far leave to the next one; the default stands at the beginning of a
/// pre-token.
pub(super) trait Rules: Default {
    /// The byte that behaves behind the last one as the end of the text does.
    const PAD: u8;

    /// End of the pre-token that begins at `at < bytes.len()`.
    fn end(bytes: &[u8], at: usize) -> usize;

    /// Where pre-tokens begin in a block; `None` leaves it to [`Self::end`].
    fn begins<L: Lanes>(&mut self, block: &Block<'_, L>) -> Option<u64>;
}

/// A mask a class. Passed by reference: copied as a vector it would wait for the single stores that made it, which took a
/// fourth of the time on plain ASCII.
type Wide = [u64; CLASSES];

/// 64 bytes with the classes of those that are no ASCII.
pub(super) struct Block<'t, L> {
    pub(super) lanes: L,
    window: &'t [u8; WINDOW],
    /// The text, and where in it the block begins.
    bytes: &'t [u8],
    at: usize,
    /// Of each class, all bytes of its characters that are no ASCII.
    wide: &'t Wide,
    /// Where the bytes are no ASCII.
    pub(super) high: u64,
    /// Bytes by which the last character stands over.
    over: usize,
    /// Class of the character behind that one; at the end of the text, of the padding.
    next: Class,
}

/// The bits of `mask` moved up by `n`, those of the block before it behind them.
#[inline(always)]
pub(super) fn up(mask: u64, before: u64, n: u32) -> u64 {
    mask << n | before >> (64 - n)
}

impl<'t, L: Lanes> Block<'t, L> {
    /// `stands_over` is of the block before: the class of its last character and the bytes of that one that are here.
    /// `wide` is room.
    #[inline(always)]
    fn new(
        lanes: L,
        table: &Classes,
        window: &'t [u8; WINDOW],
        (bytes, at): (&'t [u8], usize),
        stands_over: &mut (Class, usize),
        wide: &'t mut Wide,
    ) -> Self {
        let block = window.first_chunk().unwrap_or(&[0; BLOCK]);
        let high = lanes.high(block);
        let (mut over, mut wide_or_none) = (0, &[0; CLASSES]);
        if high != 0 {
            let (mut class, before) = *stands_over;
            *wide = [0; CLASSES];
            wide[class as usize] = !(u64::MAX << before);
            let mut leads = high & !lanes.within(block, 0x80, 0xbf);
            let mut end = 0;
            while leads != 0 {
                let at = leads.trailing_zeros() as usize % BLOCK;
                leads &= leads - 1;
                let len;
                (class, len) = table.first([window[at], window[at + 1], window[at + 2], window[at + 3]]);
                wide[class as usize] |= ((1 << len) - 1) << at;
                end = at + len;
            }
            over = end.saturating_sub(BLOCK);
            *stands_over = (class, over);
            wide_or_none = wide;
        } else {
            stands_over.1 = 0;
        }
        let next = &window[BLOCK + over..];
        let (next, _) = table.first([next[0], next[1], next[2], next[3]]);
        Self { lanes, window, bytes, at, wide: wide_or_none, high, over, next }
    }

    /// The block, or the one that begins `n` bytes behind.
    #[inline(always)]
    pub(super) fn behind(&self, n: usize) -> &'t [u8; BLOCK] {
        self.window[n..].first_chunk().unwrap_or(&[0; BLOCK])
    }

    #[inline(always)]
    pub(super) fn equal(&self, byte: u8) -> u64 {
        self.lanes.equal(self.behind(0), byte)
    }

    #[inline(always)]
    pub(super) fn within(&self, from: u8, to: u8) -> u64 {
        self.lanes.within(self.behind(0), from, to)
    }

    /// All bytes of the characters of a class that are no ASCII.
    #[inline(always)]
    pub(super) fn wide(&self, class: Class) -> u64 {
        self.wide[class as usize]
    }

    /// Of the letters that are no ASCII, all bytes.
    #[inline(always)]
    pub(super) fn wide_letters(&self) -> u64 {
        self.wide(Class::Upper) | self.wide(Class::Lower) | self.wide(Class::Letter)
    }

    /// Of the white space, all bytes; and those of blanks (0x20).
    #[inline(always)]
    pub(super) fn space(&self) -> (u64, u64) {
        let blank = self.equal(b' ');
        (blank | self.within(b'\t', b'\r') | self.wide(Class::Space), blank)
    }

    /// Where the last character of each run of white space begins; at the end of the text there is none.
    #[inline(always)]
    pub(super) fn last_of_runs(&self, space: u64) -> u64 {
        let beyond = if self.next == Class::Space { u64::MAX } else { 0 };
        let is_next = |n: u32| up_from(space, beyond, n);
        let mut last = space & !self.high & !is_next(1);
        let wide = self.wide(Class::Space);
        if wide != 0 {
            last |= wide & self.within(0xc0, 0xdf) & !is_next(2) | wide & self.within(0xe0, 0xef) & !is_next(3);
        }
        last
    }

    /// Whether the run of white space without line breaks that begins behind this block is followed by a line break;
    /// `None` if the text ends.
    #[cold]
    pub(super) fn line_break_follows(&self, table: &Classes) -> Option<bool> {
        let mut at = self.at + BLOCK + self.over;
        while let Some((class, len)) = table.at(self.bytes, at) {
            if matches!(self.bytes[at], b'\r' | b'\n') {
                return Some(true);
            }
            if class != Class::Space {
                return Some(false);
            }
            at += len;
        }
        None
    }
}

/// The bits of `mask` moved down by `n`, those of what is behind the block before them.
#[inline(always)]
fn up_from(mask: u64, behind: u64, n: u32) -> u64 {
    mask >> n | behind << (64 - n)
}

/// What offsets may be at most; in tests less, so that it is reached.
const MOST: usize = if cfg!(test) { 1 << 12 } else { u32::MAX as usize };

/// Ends that are collected before they are handed on: what is done with them is compiled once and not once a level.
const MANY: usize = 1024;

struct Found<'f> {
    f: Hand<'f>,
    base: usize,
    /// What was handed on last.
    last: usize,
    count: usize,
    places: [u32; MANY + BLOCK],
}

impl Found<'_> {
    /// The end that was found last, or the beginning of the text.
    fn last(&self) -> usize {
        match self.count {
            0 => self.last,
            n => self.base + self.places[n - 1] as usize,
        }
    }

    /// Hands everything on; `base` for what comes.
    fn flush(&mut self, base: usize) {
        self.last = self.last();
        if self.count > 0 {
            (self.f)(self.base, &self.places[..self.count]);
        }
        (self.count, self.base) = (0, base);
    }

    /// Hands [`MANY`] on: a round number, so that whoever takes them by so many at a time is seldom left with a few.
    fn make_room(&mut self) {
        self.last = self.base + self.places[MANY - 1] as usize;
        (self.f)(self.base, &self.places[..MANY]);
        self.places.copy_within(MANY..self.count, 0);
        self.count -= MANY;
    }

    fn push(&mut self, end: usize) {
        if end - self.base > MOST {
            self.flush(end);
        } else if self.count >= MANY {
            self.make_room();
        }
        self.places[self.count] = (end - self.base) as u32;
        self.count += 1;
    }

    /// The bits of `mask`, the block at `at`.
    #[inline(always)]
    fn push_all(&mut self, lanes: impl Lanes, at: usize, mask: u64) {
        if at - self.base > MOST - BLOCK {
            self.flush(at);
        } else if self.count >= MANY {
            self.make_room();
        }
        if let Some(room) = self.places[self.count..].first_chunk_mut() {
            self.count += lanes.flatten(mask, (at - self.base) as u32, room);
        }
    }
}

/// Calls `f` with the ends of the pre-tokens of `bytes`, in order.
#[inline(always)]
pub(super) fn ends_with<R: Rules>(lanes: impl Lanes, bytes: &[u8], f: Hand<'_>) {
    let table = classes();
    let mut found = Found { f, base: 0, last: 0, count: 0, places: [0; MANY + BLOCK] };
    let (mut rules, mut stands_over) = (R::default(), (Class::Other, 0));
    let (mut at, mut first) = (0, true);
    while at < bytes.len() {
        let mut padded = [R::PAD; WINDOW];
        let mut wide = [0; CLASSES];
        let rest = &bytes[at..];
        // What is done with ends in between makes the processor's own foresight begin anew.
        prefetch(bytes, at + AHEAD);
        let window = rest.first_chunk().unwrap_or_else(|| {
            padded[..rest.len()].copy_from_slice(rest);
            &padded
        });
        let block = Block::new(lanes, table, window, (bytes, at), &mut stands_over, &mut wide);
        if let Some(mut begins) = rules.begins(&block) {
            if rest.len() < BLOCK {
                begins &= !(u64::MAX << rest.len());
            }
            // The first pre-token's beginning is no other's end.
            begins &= !u64::from(first);
            first = false;
            found.push_all(lanes, at, begins);
            at += BLOCK;
        } else {
            // From the last border a pre-token at a time until past the block; there all begins anew.
            let past = bytes.len().min(at + BLOCK);
            at = found.last();
            loop {
                at = R::end(bytes, at);
                if at >= past {
                    break;
                }
                found.push(at);
            }
            if at < bytes.len() {
                found.push(at);
            }
            (rules, stands_over, first) = (R::default(), (Class::Other, 0), true);
        }
    }
    if !bytes.is_empty() {
        found.push(bytes.len());
    }
    found.flush(0);
}
