//! What the algebra of cl100k and o200k has in common: groups of three numbers, the character before letters, and white
//! space with line breaks.

use super::blocks::{Block, up};
use super::classes::{Class, classes};
use super::lanes::Lanes;

/// `\p{N}{1,3}` over numbers that are ASCII: a pre-token begins where a run does and at every third behind.
#[derive(Default)]
pub(super) struct Threes {
    number: u64,
    begins: u64,
}

impl Threes {
    #[inline(always)]
    pub(super) fn begins(&mut self, number: u64) -> u64 {
        let back = |n| up(number, self.number, n);
        let mut begins = number & !back(1);
        if number != 0 {
            let three_before = number & back(1) & back(2) & back(3);
            let mut more = (begins << 3 | self.begins >> 61) & three_before;
            while more != 0 {
                begins |= more;
                more = (more << 3) & three_before;
            }
        }
        *self = Self { number, begins };
        begins
    }
}

/// `[^\r\n\p{L}\p{N}]?` before letters: a character of no class that begins a pre-token is a part of it.
#[derive(Default)]
pub(super) struct Before {
    /// Whether the character behind the last one of the block is behind such a one.
    carry: u64,
}

impl Before {
    /// Where the characters behind those that begin at `begins` begin; `tails`: all bytes of such characters but their
    /// first. A bit is added that runs through a character's tail and stops behind it.
    #[inline(always)]
    pub(super) fn behind(&mut self, begins: u64, tails: u64) -> u64 {
        let (sum, over) = (begins << 1 | self.carry).overflowing_add(tails);
        self.carry = u64::from(over) | begins >> 63;
        sum & !tails
    }
}

/// White space: `\s*[\r\n]+` (or a spelling that is the same) before `\s+(?!\S)|\s+`.
#[derive(Default)]
pub(super) struct Space {
    own: u64,
    line: u64,
}

impl Space {
    /// Where pre-tokens begin in white space. `taken`: line breaks that belong to the pre-token before. A run ends at
    /// its last line break, what follows it leaves its last character out. `at_end`: whether what stands behind the
    /// text counts as a line break.
    #[inline(always)]
    pub(super) fn begins<L: Lanes>(
        &mut self,
        block: &Block<'_, L>,
        space: u64,
        line: u64,
        taken: u64,
        at_end: bool,
    ) -> u64 {
        let own = space & !taken;
        let first = own & !up(own, self.own, 1);
        let last = block.last_of_runs(space) & !line;
        // Behind a line break, if there is no other in the run. A bit is added to each stretch without line breaks
        // that follows one: it runs through, and shows what stands behind.
        let blank = space & !line;
        let mut behind = blank & up(line, self.line, 1);
        if behind != 0 {
            let (sum, over) = blank.overflowing_add(behind);
            let mut another = sum & !blank & line;
            while another != 0 {
                let below = behind & !(u64::MAX << another.trailing_zeros());
                behind &= !highest(below);
                another &= another - 1;
            }
            if over && block.line_break_follows(classes()).unwrap_or(at_end) {
                behind &= !highest(behind);
            }
        }
        (self.own, self.line) = (own, line);
        first | last | behind
    }
}

/// The highest bit of `mask`, which has one.
#[inline(always)]
fn highest(mask: u64) -> u64 {
    1 << mask.ilog2()
}

/// `'(?i:[sdmt]|ll|ve|re)` at the apostrophes `quote`: those with one byte behind the apostrophe, those with two.
#[inline(always)]
pub(super) fn contractions<L: Lanes>(block: &Block<'_, L>, quote: u64) -> (u64, u64) {
    let lower = |n, byte| block.lanes.equal_lower(block.behind(n), byte);
    let exact = |n, byte| block.lanes.equal(block.behind(n), byte);
    let one = lower(1, b's') | lower(1, b'd') | lower(1, b'm') | lower(1, b't');
    let two = lower(1, b'l') & lower(2, b'l') | (lower(1, b'v') | lower(1, b'r')) & lower(2, b'e');
    // U+017F is an s, but for its case.
    (quote & one, quote & (two | exact(1, 0xc5) & exact(2, 0xbf)))
}

/// Bytes of characters of a class, no ASCII, that are not their first.
#[inline(always)]
pub(super) fn tails<L: Lanes>(block: &Block<'_, L>, wide: u64) -> u64 {
    if block.high == 0 { 0 } else { wide & block.within(0x80, 0xbf) }
}

/// Whether the block has numbers that are no ASCII: those are counted by characters.
#[inline(always)]
pub(super) fn has_wide_numbers<L: Lanes>(block: &Block<'_, L>) -> bool {
    block.wide(Class::Number) != 0
}
