//! The GPT-2 pattern over plain ASCII, 64 bytes at a time: masks of classes, and borders by algebra on them.
//!
//! In: bytes of valid UTF-8 and the beginning of a pre-token. Out: the ends of pre-tokens that are certain; the rest,
//! everything that is not ASCII included, is left to the scalar scanner in `pretokenize`, which calls this.
//!
//! # The algebra
//! A bit a byte, the first byte lowest. Let L, N, O, S be letters, numbers, others and white space, B blanks (0x20).
//! A pre-token begins at a byte that is no white space if the class changes there and no blank stands before it, which
//! would belong to it: `!S & !same & !(B << 1)`. It begins at white space if what is before is none, or if what
//! follows is none, as `\s+(?!\S)` leaves the last character of a run out: `S & (!(S << 1) | !(S >> 1))`.
//! Where a contraction begins, an apostrophe that begins a pre-token and is followed by `s`, `ll` …, no pre-token
//! begins at its letters, and one begins behind it.
//!
//! Whether a byte begins a pre-token is decided by at most three bytes before it and one behind it; those that look
//! beyond the block or at its first byte that is not ASCII are left for the next one, which begins at the last border.

#![allow(clippy::inline_always, reason = "what is not inlined does not get the level's instructions")]

use bytekiln_simd::Level;

/// Bytes that are looked at together.
const BLOCK: usize = 64;

/// Classes of 64 bytes.
#[derive(Clone, Copy)]
struct Masks {
    letter: u64,
    number: u64,
    space: u64,
    blank: u64,
    quote: u64,
    /// Not ASCII; in no other mask.
    high: u64,
}

/// Instructions that compare 64 bytes. A value of such a type is the proof that the processor has them.
trait Lanes: Copy {
    fn masks(self, block: &[u8; BLOCK]) -> Masks;
    /// Where `byte` is.
    fn equal(self, block: &[u8; BLOCK], byte: u8) -> u64;
}

/// Ends that are collected before they are handed on: what is done with them is compiled once, in a loop of its own,
/// and not once a level.
const MANY: usize = 192;

/// Calls `f` with the ends of the pre-tokens of `bytes`, in order, many at a time.
///
/// `scalar(at)` is the end of the pre-token that begins at `at`: asked where a block says nothing.
pub(crate) fn ends(level: Level, bytes: &[u8], scalar: impl Fn(usize) -> usize, f: impl FnMut(&[usize])) {
    match level {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a level of the process is one that the processor has.
        Level::Avx512 => unsafe { x86::ends_avx512(bytes, scalar, f) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Level::Avx2 => unsafe { x86::ends_avx2(bytes, scalar, f) },
        _ => ends_with(Words, bytes, scalar, f),
    }
}

#[inline(always)]
fn ends_with(lanes: impl Lanes, bytes: &[u8], scalar: impl Fn(usize) -> usize, mut f: impl FnMut(&[usize])) {
    let mut found = [0; MANY + BLOCK];
    let (mut count, mut at) = (0, 0);
    while let Some(block) = bytes.get(at..).and_then(|rest| rest.first_chunk::<BLOCK>()) {
        let (mut borders, upto) = borders(lanes, block);
        let start = at;
        while borders != 0 {
            at = start + borders.trailing_zeros() as usize;
            found[count] = at;
            count += 1;
            borders &= borders - 1;
        }
        // Nothing found: one long pre-token, or text that is not ASCII; past that before blocks are tried again.
        let past = if at == start { start + upto } else { at };
        while at < past {
            at = scalar(at);
            found[count] = at;
            count += 1;
        }
        if count >= MANY {
            f(&found[..count]);
            count = 0;
        }
    }
    while at < bytes.len() {
        if count == found.len() {
            f(&found);
            count = 0;
        }
        at = scalar(at);
        found[count] = at;
        count += 1;
    }
    f(&found[..count]);
}

/// Where pre-tokens begin in a block, its first byte, which begins one, left out; and the end of the block's part that
/// is not ASCII, or 1.
#[inline(always)]
fn borders(lanes: impl Lanes, block: &[u8; BLOCK]) -> (u64, usize) {
    let Masks { letter, number, space, blank, quote, high } = lanes.masks(block);
    let other = !(letter | number | space | high);
    let same = (letter & letter << 1) | (number & number << 1) | (other & other << 1);
    let mut begin = (!space & !same & !(blank << 1)) | (space & (!(space << 1) | !(space >> 1)));
    let quote = quote & begin;
    if quote != 0 {
        let at = |byte| lanes.equal(block, byte);
        let one = (at(b's') | at(b'd') | at(b'm') | at(b't')) >> 1;
        let (l, e) = (at(b'l'), at(b'e') >> 1);
        let two = ((l & l >> 1) | ((at(b'v') | at(b'r')) & e)) >> 1;
        let (one, two) = (quote & one, quote & two);
        begin = begin & !((one | two) << 1) | one << 2 | two << 3;
    }
    let known = high.trailing_zeros(); // 64 where all is ASCII
    let certain = if known < 2 { 0 } else { u64::MAX >> (65 - known) & !1 };
    (begin & certain, (64 - high.leading_zeros()).max(1) as usize)
}

/// Eight bytes at a time in a plain register: every processor has that.
#[derive(Clone, Copy)]
struct Words;

const EACH: u64 = 0x0101_0101_0101_0101;
const TOP: u64 = 0x80 * EACH;

impl Words {
    /// A bit a byte, from the top bits of eight bytes at a time.
    #[inline(always)]
    fn gather(block: &[u8; BLOCK], top_bits: impl Fn(u64) -> u64) -> u64 {
        let (words, _) = block.as_chunks::<8>();
        let mut mask = 0;
        for (i, word) in words.iter().enumerate() {
            let top = top_bits(u64::from_le_bytes(*word)) & TOP;
            // The eight top bits, moved side by side into the highest byte.
            mask |= ((top >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56) << (8 * i);
        }
        mask
    }

    /// Top bits of the bytes of `x`, all below 0x80, that are at least `from`.
    #[inline(always)]
    fn at_least(x: u64, from: u8) -> u64 {
        x + (0x80 - u64::from(from)) * EACH
    }
}

impl Lanes for Words {
    #[inline(always)]
    fn masks(self, block: &[u8; BLOCK]) -> Masks {
        let within = |x: u64, from: u8, to: u8| Self::at_least(x & !TOP, from) & !Self::at_least(x & !TOP, to + 1) & !x;
        let blank = self.equal(block, b' ');
        Masks {
            letter: Self::gather(block, |x| within(x | (0x20 * EACH), b'a', b'z')),
            number: Self::gather(block, |x| within(x, b'0', b'9')),
            space: blank | Self::gather(block, |x| within(x, b'\t', b'\r')),
            blank,
            quote: self.equal(block, b'\''),
            high: Self::gather(block, |x| x),
        }
    }

    #[inline(always)]
    fn equal(self, block: &[u8; BLOCK], byte: u8) -> u64 {
        Self::gather(block, |x| {
            let differs = x ^ (u64::from(byte) * EACH);
            !(((differs & !TOP) + !TOP) | differs)
        })
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{BLOCK, Lanes, Masks, ends_with};
    use std::arch::x86_64::{
        __m256i, _mm256_cmpeq_epi8, _mm256_loadu_si256, _mm256_min_epu8, _mm256_movemask_epi8, _mm256_or_si256,
        _mm256_set1_epi8, _mm256_sub_epi8, _mm512_cmpeq_epi8_mask, _mm512_cmplt_epu8_mask, _mm512_loadu_si512,
        _mm512_movepi8_mask, _mm512_or_si512, _mm512_set1_epi8, _mm512_sub_epi8,
    };

    #[target_feature(enable = "avx512f,avx512bw,avx2,bmi1,bmi2,lzcnt,popcnt")]
    pub(super) fn ends_avx512(bytes: &[u8], scalar: impl Fn(usize) -> usize, f: impl FnMut(&[usize])) {
        ends_with(Avx512(()), bytes, scalar, f);
    }

    #[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt")]
    pub(super) fn ends_avx2(bytes: &[u8], scalar: impl Fn(usize) -> usize, f: impl FnMut(&[usize])) {
        ends_with(Avx2(()), bytes, scalar, f);
    }

    #[derive(Clone, Copy)]
    struct Avx512(());

    impl Lanes for Avx512 {
        #[inline(always)]
        fn masks(self, block: &[u8; BLOCK]) -> Masks {
            // SAFETY: only `ends_avx512` makes an `Avx512`; 64 bytes are there.
            unsafe {
                let x = _mm512_loadu_si512(block.as_ptr().cast());
                let all = |byte: u8| _mm512_set1_epi8(byte.cast_signed());
                let lower = _mm512_or_si512(x, all(0x20));
                let blank = _mm512_cmpeq_epi8_mask(x, all(b' '));
                Masks {
                    letter: _mm512_cmplt_epu8_mask(_mm512_sub_epi8(lower, all(b'a')), all(26)),
                    number: _mm512_cmplt_epu8_mask(_mm512_sub_epi8(x, all(b'0')), all(10)),
                    space: blank | _mm512_cmplt_epu8_mask(_mm512_sub_epi8(x, all(b'\t')), all(5)),
                    blank,
                    quote: _mm512_cmpeq_epi8_mask(x, all(b'\'')),
                    high: _mm512_movepi8_mask(x),
                }
            }
        }

        #[inline(always)]
        fn equal(self, block: &[u8; BLOCK], byte: u8) -> u64 {
            // SAFETY: as above.
            unsafe {
                let x = _mm512_loadu_si512(block.as_ptr().cast());
                _mm512_cmpeq_epi8_mask(x, _mm512_set1_epi8(byte.cast_signed()))
            }
        }
    }

    #[derive(Clone, Copy)]
    struct Avx2(());

    impl Avx2 {
        #[inline(always)]
        fn gather(block: &[u8; BLOCK], f: impl Fn(__m256i) -> __m256i) -> u64 {
            // SAFETY: only `ends_avx2` makes an `Avx2`; 64 bytes are there.
            unsafe {
                let mask = |at| {
                    let x = _mm256_loadu_si256(block.as_ptr().add(at).cast());
                    u64::from(_mm256_movemask_epi8(f(x)).cast_unsigned())
                };
                mask(0) | mask(32) << 32
            }
        }

        /// Bytes of `x` from `from` on, `count` of them.
        #[inline(always)]
        fn within(x: __m256i, from: u8, count: u8) -> __m256i {
            // SAFETY: as above.
            unsafe {
                let away = _mm256_sub_epi8(x, _mm256_set1_epi8(from.cast_signed()));
                _mm256_cmpeq_epi8(_mm256_min_epu8(away, _mm256_set1_epi8((count - 1).cast_signed())), away)
            }
        }
    }

    impl Lanes for Avx2 {
        #[inline(always)]
        fn masks(self, block: &[u8; BLOCK]) -> Masks {
            // SAFETY: as above.
            let lower = |x| unsafe { _mm256_or_si256(x, _mm256_set1_epi8(0x20)) };
            let blank = self.equal(block, b' ');
            Masks {
                letter: Self::gather(block, |x| Self::within(lower(x), b'a', 26)),
                number: Self::gather(block, |x| Self::within(x, b'0', 10)),
                space: blank | Self::gather(block, |x| Self::within(x, b'\t', 5)),
                blank,
                quote: self.equal(block, b'\''),
                high: Self::gather(block, |x| x),
            }
        }

        #[inline(always)]
        fn equal(self, block: &[u8; BLOCK], byte: u8) -> u64 {
            // SAFETY: as above.
            Self::gather(block, |x| unsafe { _mm256_cmpeq_epi8(x, _mm256_set1_epi8(byte.cast_signed())) })
        }
    }
}
