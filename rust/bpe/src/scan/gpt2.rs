//! GPT-2's pattern as [`Rules`].
//!
//! # The algebra
//! A bit a byte, all bytes of a character in its class's mask. Let L, N, O, S be letters, numbers, others and white
//! space, B blanks (0x20). A pre-token begins at a character that is no white space if the class changes there and no
//! blank stands before it, which would belong to it: `!S & !same & !(B << 1)`. It begins at white space if what is
//! before is none, or if what follows is none, as `\s+(?!\S)` leaves the last character of a run out.
//! Where a contraction begins, an apostrophe that begins a pre-token and is followed by `s`, `ll` …, no pre-token
//! begins at its letters, and one begins behind it.

use super::blocks::{Block, Rules, up};
use super::by_character::gpt2_end;
use super::classes::Class;
use super::lanes::Lanes;

/// Masks of the block before.
#[derive(Default)]
pub(super) struct Gpt2 {
    letter: u64,
    number: u64,
    space: u64,
    other: u64,
    blank: u64,
    /// Apostrophes of contractions with one letter and with two.
    one: u64,
    two: u64,
}

impl Rules for Gpt2 {
    /// White space: a run at the end goes on.
    const PAD: u8 = b' ';

    fn end(bytes: &[u8], at: usize) -> usize {
        gpt2_end(bytes, at)
    }

    #[inline(always)]
    fn begins<L: Lanes>(&mut self, block: &Block<'_, L>) -> Option<u64> {
        let (space, blank) = block.space();
        let letter = block.lanes.letters(block.behind(0)) | block.wide_letters();
        let number = block.within(b'0', b'9') | block.wide(Class::Number);
        let other = !(letter | number | space);
        let same = (letter & up(letter, self.letter, 1))
            | (number & up(number, self.number, 1))
            | (other & up(other, self.other, 1));
        let first = space & !up(space, self.space, 1);
        let mut begins = (!space & !same & !up(blank, self.blank, 1)) | first | block.last_of_runs(space);
        let quote = block.equal(b'\'') & begins;
        let (mut one, mut two) = (0, 0);
        if (quote | self.one | self.two) != 0 {
            let at = |n, byte| block.lanes.equal(block.behind(n), byte);
            one = quote & (at(1, b's') | at(1, b'd') | at(1, b'm') | at(1, b't'));
            two = quote & (at(1, b'l') & at(2, b'l') | (at(1, b'v') | at(1, b'r')) & at(2, b'e'));
            begins &= !up(one | two, self.one | self.two, 1);
            begins |= up(one, self.one, 2) | up(two, self.two, 3);
        }
        *self = Self { letter, number, space, other, blank, one, two };
        Some(begins)
    }
}
