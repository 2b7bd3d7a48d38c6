//! o200k's pattern as [`Rules`].
//!
//! # The algebra
//! Names as in `cl100k`, but that marks count as letters. U are letters of upper and title case, V of lower case; the
//! rest of the letters may stand where either may.
//! - A word goes from U to V: it ends where V is followed by U. Where a letter that may be either is followed by U the
//!   end depends on what comes later: left to `by_character`.
//! - A contraction behind a word belongs to it: no pre-token begins in it, one begins behind it, and a second one there
//!   is no contraction: left to `by_character`.
//! - A mark behind an other belongs to the other or to a word: left to `by_character`.
//! - Others take line breaks and slashes behind their first line break.

use super::blocks::{Block, Rules, up};
use super::by_character::o200k_end;
use super::classes::Class;
use super::lanes::Lanes;
use super::tail::{Before, Space, Threes, contractions, has_wide_numbers, tails};

/// What the block before leaves.
#[derive(Default)]
pub(super) struct O200k {
    letter: u64,
    /// Letters that are V, and those that may be either.
    lower: u64,
    either: u64,
    /// Others, and those of them that are not taken.
    other: u64,
    own: u64,
    blank: u64,
    /// White space but line breaks.
    inner: u64,
    /// Line breaks and slashes of others.
    taken: u64,
    one: u64,
    two: u64,
    threes: Threes,
    before: Before,
    space: Space,
}

impl Rules for O200k {
    /// No line break: behind the last one the white space at the end is a pre-token of its own.
    const PAD: u8 = b' ';

    fn end(bytes: &[u8], at: usize) -> usize {
        o200k_end(bytes, at)
    }

    #[inline(always)]
    fn begins<L: Lanes>(&mut self, block: &Block<'_, L>) -> Option<u64> {
        if has_wide_numbers(block) {
            return None;
        }
        let (space, blank) = block.space();
        let line = block.equal(b'\n') | block.equal(b'\r');
        let inner = space & !line;
        let upper = block.within(b'A', b'Z') | block.wide(Class::Upper);
        let lower = block.within(b'a', b'z') | block.wide(Class::Lower);
        let either = block.wide(Class::Letter) | block.wide(Class::Mark);
        let letter = upper | lower | either;
        let number = block.within(b'0', b'9');
        let other = !(letter | number | space);
        let behind_other = up(other, self.other, 1);
        if (upper & up(either, self.either, 1) | block.wide(Class::Mark) & behind_other) != 0 {
            return None;
        }

        // What others take: a bit added where it begins clears the stretch of line breaks and slashes from there on,
        // and one added again inside of it is put right by `start` itself.
        let may = line | block.equal(b'/');
        let start = line & behind_other | may & self.taken >> 63;
        let taken = (may ^ may.wrapping_add(start) | start) & may;
        let own = other & !taken;
        let others = own & !up(own, self.own, 1) & !up(blank, self.blank, 1);
        let behind = self.before.behind(others, tails(block, block.wide(Class::Other)));
        let joined = up(letter, self.letter, 1) | up(inner, self.inner, 1) | behind;
        let spaces = self.space.begins(block, space, line, taken, false);
        let letters = letter & !joined | upper & up(lower, self.lower, 1);
        let mut begins = others | letters | self.threes.begins(number) | spaces;

        let quote = block.equal(b'\'') & up(letter, self.letter, 1);
        let (mut one, mut two) = (0, 0);
        if (quote | self.one | self.two) != 0 {
            (one, two) = contractions(block, quote);
            let ends = up(one, self.one, 2) | up(two, self.two, 3);
            if ends & (one | two) != 0 {
                return None;
            }
            let (any, before) = (one | two, self.one | self.two);
            begins = begins & !(any | up(any, before, 1) | up(two, self.two, 2)) | ends;
        }
        (self.letter, self.lower, self.either) = (letter, lower, either);
        (self.other, self.own, self.blank, self.inner) = (other, own, blank, inner);
        (self.taken, self.one, self.two) = (taken, one, two);
        Some(begins)
    }
}
