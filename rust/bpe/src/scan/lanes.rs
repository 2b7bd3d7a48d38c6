//! Comparisons of 64 bytes at once, a bit a byte, the first byte lowest; and the way back from bits to places.

/// Bytes that are looked at together.
pub(super) const BLOCK: usize = 64;

/// Instructions that compare 64 bytes. A value of such a type is the proof that the processor has them.
pub(super) trait Lanes: Copy {
    /// Where the bytes are at least `from` and at most `to`.
    fn within(self, block: &[u8; BLOCK], from: u8, to: u8) -> u64;

    /// Where the bytes are ASCII letters of either case.
    fn letters(self, block: &[u8; BLOCK]) -> u64;

    /// Where the bytes are `byte`.
    fn equal(self, block: &[u8; BLOCK], byte: u8) -> u64;

    /// Where the bytes are `byte` or, `byte` a letter of lower case, that letter in upper case.
    fn equal_lower(self, block: &[u8; BLOCK], byte: u8) -> u64;

    /// Where the top bit is set: no ASCII.
    fn high(self, block: &[u8; BLOCK]) -> u64;

    /// Writes `base` plus the number of each set bit, ascending, to the beginning of `out`, and anything behind them.
    /// Returns how many bits are set.
    #[inline(always)]
    fn flatten(self, mut mask: u64, base: u32, out: &mut [u32; BLOCK]) -> usize {
        let count = mask.count_ones() as usize;
        // Eight at a time whether there are so many or not: a jump for eight, and seldom another.
        for eight in out.as_chunks_mut::<8>().0 {
            for place in eight {
                *place = base.wrapping_add(mask.trailing_zeros());
                mask &= mask.wrapping_sub(1);
            }
            if mask == 0 {
                break;
            }
        }
        count
    }
}

/// Eight bytes at a time in a plain register: every processor has that.
#[derive(Clone, Copy)]
pub(super) struct Words;

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

    /// Top bits of the bytes of `x` that are at least `from` and at most `to`, both on one side of 0x80.
    #[inline(always)]
    fn top_within(x: u64, from: u8, to: u8) -> u64 {
        let side = if from < 0x80 { !x } else { x };
        Self::at_least(x & !TOP, from & 0x7f) & !Self::at_least(x & !TOP, (to & 0x7f) + 1) & side
    }

    #[inline(always)]
    fn top_equal(x: u64, byte: u8) -> u64 {
        let differs = x ^ (u64::from(byte) * EACH);
        !(((differs & !TOP) + !TOP) | differs)
    }
}

impl Lanes for Words {
    #[inline(always)]
    fn within(self, block: &[u8; BLOCK], from: u8, to: u8) -> u64 {
        Self::gather(block, |x| Self::top_within(x, from, to))
    }

    #[inline(always)]
    fn letters(self, block: &[u8; BLOCK]) -> u64 {
        Self::gather(block, |x| Self::top_within(x | (0x20 * EACH), b'a', b'z'))
    }

    #[inline(always)]
    fn equal(self, block: &[u8; BLOCK], byte: u8) -> u64 {
        Self::gather(block, |x| Self::top_equal(x, byte))
    }

    #[inline(always)]
    fn equal_lower(self, block: &[u8; BLOCK], byte: u8) -> u64 {
        Self::gather(block, |x| Self::top_equal(x | (0x20 * EACH), byte))
    }

    #[inline(always)]
    fn high(self, block: &[u8; BLOCK]) -> u64 {
        Self::gather(block, |x| x)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::{BLOCK, Lanes};
    use proptest::prelude::*;

    /// What the trait says, a byte at a time.
    #[derive(Clone, Copy)]
    struct OneByOne;

    impl OneByOne {
        fn where_(block: &[u8; BLOCK], f: impl Fn(u8) -> bool) -> u64 {
            (0..).zip(block).map(|(i, &byte)| u64::from(f(byte)) << i).sum()
        }
    }

    /// Holds `lanes` to the specification above on blocks of any bytes.
    pub(in crate::scan) fn hold(lanes: impl Lanes) {
        proptest!(ProptestConfig::with_cases(300), |(
            bytes in prop::collection::vec(prop_oneof![any::<u8>(), 0x20u8..0x80], BLOCK),
            mask in prop_oneof![any::<u64>(), Just(0), Just(u64::MAX), (0u32..64).prop_map(|n| 1 << n)],
            base in any::<u32>(),
            byte in any::<u8>(),
        )| {
            let block: &[u8; BLOCK] = bytes.as_slice().try_into().unwrap();
            for (from, to) in [(b'A', b'Z'), (b'0', b'9'), (b'\t', b'\r'), (0x80, 0xbf), (0xe0, 0xf0), (0xc4, 0xca), (0, 0x7e)] {
                prop_assert_eq!(lanes.within(block, from, to), OneByOne::where_(block, |x| (from..=to).contains(&x)));
            }
            prop_assert_eq!(lanes.letters(block), OneByOne::where_(block, |x| x.is_ascii_alphabetic()));
            prop_assert_eq!(lanes.high(block), OneByOne::where_(block, |x| !x.is_ascii()));
            for byte in [byte, block[9]] {
                prop_assert_eq!(lanes.equal(block, byte), OneByOne::where_(block, |x| x == byte));
            }
            for byte in [b's', b'e', b'l'] {
                prop_assert_eq!(lanes.equal_lower(block, byte), OneByOne::where_(block, |x| x.to_ascii_lowercase() == byte));
            }
            let mut out = [0; BLOCK];
            let count = lanes.flatten(mask, base, &mut out);
            let expected: Vec<u32> = (0..64).filter(|i| mask >> i & 1 == 1).map(|i| base.wrapping_add(i)).collect();
            prop_assert_eq!(&out[..count], &expected[..]);
        });
    }

    #[test]
    fn plain_registers_compare_as_one_by_one() {
        hold(super::Words);
    }
}
