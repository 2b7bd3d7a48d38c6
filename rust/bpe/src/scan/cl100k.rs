//! cl100k's pattern as [`Rules`].
//!
//! # The algebra
//! Names as in `gpt2`; R are line breaks, marks are others.
//! - An other begins a pre-token unless an other or a blank stands before it. Line breaks behind it are its own.
//! - A letter begins one unless what stands before it is a letter, white space that is no line break (always the last
//!   character of its run, which begins a pre-token), or an other that begins a pre-token.
//! - A contraction is a pre-token of its own: its letters follow an apostrophe that begins one, so all that is left is
//!   to begin another behind it.
//! - Numbers and white space: `tail`.

use super::blocks::{Block, Rules, up};
use super::by_character::cl100k_end;
use super::classes::Class;
use super::lanes::Lanes;
use super::tail::{Before, Space, Threes, contractions, has_wide_numbers, tails};

/// What the block before leaves.
#[derive(Default)]
pub(super) struct Cl100k {
    letter: u64,
    other: u64,
    blank: u64,
    /// White space but line breaks.
    inner: u64,
    /// Line breaks of others.
    taken: u64,
    one: u64,
    two: u64,
    threes: Threes,
    before: Before,
    space: Space,
}

impl Rules for Cl100k {
    /// `\s++$`: white space at the end is one, as if a line break ended it.
    const PAD: u8 = b'\n';

    fn end(bytes: &[u8], at: usize) -> usize {
        cl100k_end(bytes, at)
    }

    #[inline(always)]
    fn begins<L: Lanes>(&mut self, block: &Block<'_, L>) -> Option<u64> {
        if has_wide_numbers(block) {
            return None;
        }
        let (space, blank) = block.space();
        let line = block.equal(b'\n') | block.equal(b'\r');
        let inner = space & !line;
        let letter = block.lanes.letters(block.behind(0)) | block.wide_letters();
        let number = block.within(b'0', b'9');
        let other = !(letter | number | space);

        let others = other & !up(other, self.other, 1) & !up(blank, self.blank, 1);
        let wide_others = block.wide(Class::Other) | block.wide(Class::Mark);
        let behind = self.before.behind(others, tails(block, wide_others));
        let joined = up(letter, self.letter, 1) | up(inner, self.inner, 1) | behind;
        // Added to the run that begins behind an other, a bit clears it.
        let start = line & up(other, self.other, 1) | line & self.taken >> 63;
        let taken = line & !line.wrapping_add(start);
        let spaces = self.space.begins(block, space, line, taken, true);
        let mut begins = others | letter & !joined | self.threes.begins(number) | spaces;

        let quote = block.equal(b'\'') & others;
        let (mut one, mut two) = (0, 0);
        if (quote | self.one | self.two) != 0 {
            (one, two) = contractions(block, quote);
            begins |= up(one, self.one, 2) | up(two, self.two, 3);
        }
        (self.letter, self.other, self.blank, self.inner) = (letter, other, blank, inner);
        (self.taken, self.one, self.two) = (taken, one, two);
        Some(begins)
    }
}
