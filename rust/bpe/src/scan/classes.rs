//! The class of every code point, as far as the three patterns tell characters apart.
//!
//! In: valid UTF-8. Out: a [`Class`] and a length in bytes. Called by the scanners of this room, and by `pretokenize`
//! for the borders at which a stream may be cut.

use std::sync::OnceLock;

use regex_syntax::hir::{Class as HirClass, HirKind};

/// What a character is to a pattern. Every character is one of these: `\p{L}` is the union of the first three behind
/// `Other`, `\s` is `White_Space`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Class {
    /// None of the following.
    Other,
    /// `\p{Lu}` and `\p{Lt}`.
    Upper,
    /// `\p{Ll}`.
    Lower,
    /// `\p{Lm}` and `\p{Lo}`: letters without case.
    Letter,
    /// `\p{M}`.
    Mark,
    /// `\p{N}`.
    Number,
    /// `\s`.
    Space,
}

/// Number of classes, rounded up to a power of two: an index below it needs no check.
pub(crate) const CLASSES: usize = 8;

impl Class {
    /// Every class by the expressions whose union it is; they do not overlap.
    const SOURCES: [(Self, &[&str]); 6] = [
        (Self::Upper, &[r"\p{Lu}", r"\p{Lt}"]),
        (Self::Lower, &[r"\p{Ll}"]),
        (Self::Letter, &[r"\p{Lm}", r"\p{Lo}"]),
        (Self::Mark, &[r"\p{M}"]),
        (Self::Number, &[r"\p{N}"]),
        (Self::Space, &[r"\s"]),
    ];

    /// Whether it is of `\p{L}`.
    #[inline(always)]
    pub(crate) fn is_letter(self) -> bool {
        matches!(self, Self::Upper | Self::Lower | Self::Letter)
    }
}

const ASCII: [Class; 128] = {
    let mut table = [Class::Other; 128];
    let mut i = 0;
    while i < 128 {
        table[i] = match i as u8 {
            b'a'..=b'z' => Class::Lower,
            b'A'..=b'Z' => Class::Upper,
            b'0'..=b'9' => Class::Number,
            b'\t'..=b'\r' | b' ' => Class::Space,
            _ => Class::Other,
        };
        i += 1;
    }
    table
};

/// Code points that differ only in the last byte of their UTF-8 form lie in one block.
const BLOCK: usize = 64;

/// Two levels: 34 KiB of block numbers, and the blocks that are not of one class throughout (about 40 KiB).
#[derive(Debug)]
pub(crate) struct Classes {
    blocks: Vec<u16>,
    classes: Vec<[Class; BLOCK]>,
}

/// The table, made when it is asked for first.
pub(crate) fn classes() -> &'static Classes {
    static TABLE: OnceLock<Classes> = OnceLock::new();
    TABLE.get_or_init(Classes::new)
}

impl Classes {
    fn new() -> Self {
        let mut table = Self { blocks: vec![0; 0x11_0000 / BLOCK], classes: vec![[Class::Other; BLOCK]] };
        for (class, sources) in Class::SOURCES {
            let whole = table.classes.len() as u16;
            table.classes.push([class; BLOCK]);
            for source in sources {
                // Names that regex-syntax knows; the tests hold every code point to fancy-regex.
                let Ok(hir) = regex_syntax::parse(source) else { continue };
                let HirKind::Class(HirClass::Unicode(ranges)) = hir.kind() else { continue };
                for range in ranges.ranges() {
                    table.fill(range.start() as usize, range.end() as usize + 1, class, whole);
                }
            }
        }
        table
    }

    /// Gives `from .. to` a class; `whole` is the block that has it throughout.
    fn fill(&mut self, from: usize, to: usize, class: Class, whole: u16) {
        let mut at = from;
        while at < to {
            let (block, first) = (at / BLOCK, at % BLOCK);
            let end = (to - (at - first)).min(BLOCK);
            if end - first == BLOCK {
                self.blocks[block] = whole;
            } else {
                if self.blocks[block] == 0 {
                    self.blocks[block] = self.classes.len() as u16;
                    self.classes.push([Class::Other; BLOCK]);
                }
                self.classes[self.blocks[block] as usize][first..end].fill(class);
            }
            at += end - first;
        }
    }

    /// Class of a code point.
    #[inline(always)]
    fn of(&self, block: usize, low: usize) -> Class {
        self.classes[self.blocks[block] as usize][low]
    }

    /// The character that begins with `bytes`, a part of valid UTF-8 that holds it wholly: class and length.
    #[inline(always)]
    pub(crate) fn first(&self, bytes: [u8; 4]) -> (Class, usize) {
        let low = |i: usize| usize::from(bytes[i] & 0x3f);
        let lead = usize::from(bytes[0]);
        match lead {
            0..=0x7f => (ASCII[lead], 1),
            0x80..=0xdf => (self.of(lead & 0x1f, low(1)), 2),
            0xe0..=0xef => (self.of((lead & 0x0f) << 6 | low(1), low(2)), 3),
            _ => (self.of((lead & 0x07) << 12 | low(1) << 6 | low(2), low(3)), 4),
        }
    }

    /// The character at `at` of valid UTF-8; `None` at the end.
    #[inline(always)]
    pub(crate) fn at(&self, bytes: &[u8], at: usize) -> Option<(Class, usize)> {
        let &lead = bytes.get(at)?;
        if lead < 0x80 {
            return Some((ASCII[lead as usize], 1));
        }
        let mut four = [lead, 0, 0, 0];
        for (to, &from) in four[1..].iter_mut().zip(&bytes[at + 1..]) {
            *to = from;
        }
        Some(self.first(four))
    }

    /// Class of the character that ends before `at`; what is not UTF-8 counts as [`Class::Other`], as U+FFFD does.
    pub(crate) fn before(&self, bytes: &[u8], at: usize) -> Class {
        let last = bytes[at - 1];
        if last < 0x80 {
            return ASCII[last as usize];
        }
        let tail = String::from_utf8_lossy(&bytes[at.saturating_sub(4)..at]);
        let Some(c) = tail.chars().next_back() else { return Class::Other };
        self.of(c as usize / BLOCK, c as usize % BLOCK)
    }
}
