//! Short words as numbers of 16 bytes: keys of the tables of `word_counts` and `encode`.
//!
//! In: words of a text, one or many at a time. Out: keys and their hashes. A processor with AES makes a hash of two of its
//! rounds: with its loads a word is a dozen instructions, half of what multiplying takes.

#![allow(unsafe_code, reason = "vector instructions; held to the plain way by a property test")]

use bytekiln_simd::Level;

use crate::hash::prefetch;
use crate::pretokenize::Ends;

/// Keys of `N` words that follow each other, 0 of those that are too long for one, and their hashes.
#[derive(Debug, Clone)]
pub(crate) struct Keys<const N: usize> {
    pub(crate) keys: [u128; N],
    pub(crate) hashes: [u32; N],
}

impl<const N: usize> Default for Keys<N> {
    fn default() -> Self {
        Self { keys: [0; N], hashes: [0; N] }
    }
}

/// How this process hashes keys.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Hasher {
    level: Level,
    seed: u32,
}

impl Hasher {
    pub(crate) fn new(level: Level, seed: u32) -> Self {
        Self { level, seed }
    }

    #[inline]
    pub(crate) fn level(self) -> Level {
        self.level
    }

    /// A hash of a key.
    #[inline]
    pub(crate) fn hash(self, key: u128) -> u32 {
        match self.level {
            // SAFETY: the level says that the processor has the instructions.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 | Level::Avx512 | Level::Avx512Vbmi2 => unsafe { x86::hash(key) ^ self.seed },
            _ => hash_packed(key) as u32 ^ self.seed,
        }
    }

    /// Keys and hashes of at most `N` words of `text`, whose places in `table`, which has a power of two of them,
    /// are asked for. Returns the end of the last word.
    ///
    /// `ends.start` is where the first begins; `offsets` are some of `ends.offsets`.
    #[inline]
    pub(crate) fn keys<const N: usize, T>(self, text: &[u8], ends: &Ends<'_>, table: &[T], to: &mut Keys<N>) -> usize {
        debug_assert!(ends.offsets.len() <= N && table.len().is_power_of_two());
        match self.level {
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 | Level::Avx512 | Level::Avx512Vbmi2 => {
                // SAFETY: the level says that the processor has the instructions.
                if let Some(end) = unsafe { x86::keys(text, ends, self.seed, table, to) } {
                    return end;
                }
            }
            _ => {}
        }
        let (mut start, mask) = (ends.start, table.len() - 1);
        for ((key, hash), &offset) in to.keys.iter_mut().zip(&mut to.hashes).zip(ends.offsets) {
            let end = ends.base.wrapping_add(offset as usize);
            *key = pack_at(text, start, end.wrapping_sub(start));
            *hash = self.hash(*key);
            prefetch(table, *hash as usize & mask);
            start = end;
        }
        start
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m128i, _mm_aesenc_si128, _mm_and_si128, _mm_cvtsi128_si32, _mm_load_si128, _mm_loadu_si128, _mm_or_si128,
        _mm_set_epi64x, _mm_storeu_si128,
    };

    use super::{Ends, FIRST, Keys};
    use crate::hash::prefetch;

    /// Of each length the bytes that are kept, and the length where a key has it; of lengths over 15 nothing.
    #[repr(align(32))]
    struct Length([u128; 2]);

    const LENGTHS: [Length; 17] = {
        let mut lengths = [const { Length([0; 2]) }; 17];
        let mut n = 1;
        while n < 16 {
            lengths[n] = Length([FIRST[n], (n as u128) << 120]);
            n += 1;
        }
        lengths
    };

    #[inline]
    #[target_feature(enable = "avx2,aes")]
    fn hash_of(key: __m128i) -> u32 {
        let once =
            _mm_aesenc_si128(key, _mm_set_epi64x(0x9e37_79b9_7f4a_7c15_u64.cast_signed(), 0x2545_f491_4f6c_dd1d));
        let twice =
            _mm_aesenc_si128(once, _mm_set_epi64x(0xd1b5_4a32_d192_ed03_u64.cast_signed(), 0x1656_67b1_9e37_79f9));
        _mm_cvtsi128_si32(twice).cast_unsigned()
    }

    #[target_feature(enable = "avx2,aes")]
    pub(super) fn hash(key: u128) -> u32 {
        hash_of(_mm_set_epi64x((key >> 64) as i64, key as i64))
    }

    /// `None` near the end of `text`: a key is one load of 16 bytes.
    #[target_feature(enable = "avx2,aes,bmi1,bmi2")]
    pub(super) fn keys<const N: usize, T>(
        text: &[u8],
        ends: &Ends<'_>,
        seed: u32,
        table: &[T],
        to: &mut Keys<N>,
    ) -> Option<usize> {
        // They ascend, but all that follows depends on no word beginning behind this.
        let last = ends.offsets.iter().fold(0, |last, &offset| last.max(offset));
        let last = ends.base.wrapping_add(last as usize).max(ends.start);
        if ends.base > text.len() || last.checked_add(16).is_none_or(|end| end > text.len()) {
            return None;
        }
        let (mut start, mask) = (ends.start, table.len().wrapping_sub(1));
        let number = ends.offsets.len().min(N);
        for n in 0..number {
            // SAFETY: `n` is less than the lengths of all three.
            let (offset, key, to_hash) = unsafe {
                (*ends.offsets.get_unchecked(n), to.keys.get_unchecked_mut(n), to.hashes.get_unchecked_mut(n))
            };
            let end = ends.base.wrapping_add(offset as usize);
            let Length([kept, length]) = &LENGTHS[end.wrapping_sub(start).min(16)];
            // SAFETY: 16 bytes follow `start`, and the constants are aligned.
            let word = unsafe {
                let bytes = _mm_loadu_si128(text.as_ptr().add(start).cast());
                let bytes = _mm_and_si128(bytes, _mm_load_si128(std::ptr::from_ref(kept).cast()));
                _mm_or_si128(bytes, _mm_load_si128(std::ptr::from_ref(length).cast()))
            };
            let hash = hash_of(word) ^ seed;
            prefetch(table, hash as usize & mask);
            // SAFETY: a key has 16 bytes.
            unsafe { _mm_storeu_si128(std::ptr::from_mut(key).cast(), word) };
            *to_hash = hash;
            start = end;
        }
        Some(start)
    }
}

/// Longest word that is packed with its length into 16 bytes.
pub(crate) const PACKED: usize = 15;

/// A word of at most 15 bytes with its length in the top byte; 0 is no word.
pub(crate) fn pack(word: &[u8]) -> Option<u128> {
    let n = word.len();
    let u64_at = |i: usize| -> u64 {
        let mut b = [0; 8];
        b.copy_from_slice(&word[i..i + 8]);
        u64::from_le_bytes(b)
    };
    let u32_at = |i: usize| -> u64 {
        let mut b = [0; 4];
        b.copy_from_slice(&word[i..i + 4]);
        u64::from(u32::from_le_bytes(b))
    };
    // Two loads that overlap instead of a copy of variable length: the copy is a call, which costs as much as
    // the look-up.
    let (low, high) = match n {
        0 => return None,
        1..=3 => {
            let (first, middle, last) = (word[0], word[n / 2], word[n - 1]);
            let bytes = u64::from(first) | u64::from(middle) << (8 * (n / 2)) | u64::from(last) << (8 * (n - 1));
            (bytes, 0)
        }
        4..=7 => (u32_at(0) | u32_at(n - 4) << (8 * (n - 4)), 0),
        8 => (u64_at(0), 0),
        9..=PACKED => (u64_at(0), u64_at(n - 8) >> (8 * (16 - n))),
        _ => return None,
    };
    Some(u128::from(low) | u128::from(high) << 64 | (n as u128) << 120)
}

/// [`pack`] of a word in a text; 0 where it is too long. One load whatever the length, where the text goes on for so long.
#[inline]
fn pack_at(text: &[u8], start: usize, len: usize) -> u128 {
    match text.get(start..).and_then(|rest| rest.first_chunk()) {
        Some(bytes) if len <= PACKED => u128::from_le_bytes(*bytes) & FIRST[len] | (len as u128) << 120,
        _ => pack(&text[start..start + len]).unwrap_or_default(),
    }
}

/// Bytes of a packed word.
pub(crate) fn packed_len(key: u128) -> usize {
    (key >> 120) as usize
}

/// A hash of a packed word: one multiplication of its two halves, folded, and one more: with the first alone keys that differ in
/// a few high bits fall into a ninth of the places.
fn hash_packed(key: u128) -> u64 {
    let product =
        u128::from(key as u64 ^ 0x9e37_79b9_7f4a_7c15) * u128::from((key >> 64) as u64 ^ 0xd1b5_4a32_d192_ed03);
    let folded = product as u64 ^ (product >> 64) as u64;
    (folded ^ folded >> 32).wrapping_mul(0xff51_afd7_ed55_8ccd) >> 32
}

/// All bits of the first so many bytes.
const FIRST: [u128; 16] = {
    let mut masks = [0; 16];
    let mut n = 1;
    while n < 16 {
        masks[n] = u128::MAX >> (128 - 8 * n);
        n += 1;
    }
    masks
};

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_level_makes_the_same_keys(
            lengths in prop::collection::vec(1usize..20, 1..=64),
            start in 0usize..40,
            base in 0usize..40,
            behind in 0usize..20,
        ) {
            let base = base.min(start);
            let ends: Vec<usize> = lengths.iter().scan(start, |end, length| { *end += length; Some(*end) }).collect();
            let last = ends.last().copied().unwrap_or(start);
            let text: Vec<u8> = (0..last + behind).map(|at| (at * 7 % 251) as u8).collect();
            let offsets: Vec<u32> = ends.iter().map(|end| (end - base) as u32).collect();
            for level in Level::ALL.into_iter().filter(|level| level.is_here()) {
                let (hasher, mut keys) = (Hasher::new(level, behind as u32), Keys::<64>::default());
                let end = hasher.keys(&text, &Ends { start, base, offsets: &offsets }, &[(); 64], &mut keys);
                prop_assert_eq!(end, last);
                let mut from = start;
                for (n, &end) in ends.iter().enumerate() {
                    prop_assert_eq!(keys.keys[n], pack(&text[from..end]).unwrap_or_default(), "{}", level.name());
                    prop_assert_eq!(keys.hashes[n], hasher.hash(keys.keys[n]));
                    from = end;
                }
            }
        }

        #[test]
        fn hashes_spread(bits in prop::collection::vec(0u32..128, 4)) {
            // Keys that differ in some bits fall into more than an eighth of 256 places (at random: into 162).
            for level in Level::ALL.into_iter().filter(|level| level.is_here()) {
                let hasher = Hasher::new(level, 0);
                let mut places: Vec<u32> = (0..256u128)
                    .map(|n| hasher.hash(n << (bits[0] % 120) ^ u128::from(bits[1]) << (bits[2] % 120)) & 255)
                    .collect();
                places.sort_unstable();
                places.dedup();
                prop_assert!(places.len() > 32, "{} at {}", places.len(), level.name());
            }
        }

        #[test]
        fn packing_is_injective(word in prop::collection::vec(any::<u8>(), 1..=PACKED)) {
            let key = pack(&word).unwrap();
            prop_assert_eq!(&key.to_le_bytes()[..packed_len(key)], word);
        }
    }
}
