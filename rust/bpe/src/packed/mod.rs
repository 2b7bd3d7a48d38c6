//! Short words as numbers of 16 bytes: keys of the tables of `word_counts` and `encode`.
//!
//! In: words of a text, one or many at a time. Out: keys and their hashes. A processor with AES makes a hash of two of its
//! rounds: with its loads a word is a dozen instructions, half of what multiplying takes.

#![allow(unsafe_code, reason = "vector instructions; held to the plain way by a property test")]

#[cfg(target_arch = "x86_64")]
mod x86;

use bytekiln_simd::Level;

use crate::hash::prefetch;
use crate::pretokenize::Ends;

/// Keys of `N` words that follow each other, 0 of those that are too long for one, and where they belong in a table: its places
/// begin at multiples of `UNIT` bytes.
#[derive(Debug, Clone)]
#[repr(align(64))]
pub(crate) struct Keys<const N: usize, const UNIT: usize> {
    pub(crate) keys: [u128; N],
    /// In units from the table's beginning.
    pub(crate) places: [u32; N],
}

impl<const N: usize, const UNIT: usize> Default for Keys<N, UNIT> {
    fn default() -> Self {
        Self { keys: [0; N], places: [0; N] }
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
    fn hash(self, key: u128) -> u32 {
        match self.level {
            // SAFETY: the level says that the processor has the instructions.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 | Level::Avx512 | Level::Avx512Vbmi2 => unsafe { x86::hash(key) ^ self.seed },
            _ => hash_packed(key) as u32 ^ self.seed,
        }
    }

    /// The place of a key in a table of a power of two of them.
    #[inline]
    pub(crate) fn place(self, key: u128, of: usize) -> usize {
        self.hash(key) as usize & of.wrapping_sub(1)
    }

    /// Keys of at most `N` words of `text`, whose places in `table`, which has a power of two of them, are asked for if they
    /// are to be by `ASK`. Returns the end of the last word. Four thousand million units must hold the table.
    ///
    /// `ends.start` is where the first begins.
    #[inline]
    pub(crate) fn keys<const ASK: bool, const N: usize, const UNIT: usize, T>(
        self,
        text: &[u8],
        ends: &Ends<'_>,
        table: &[T],
        to: &mut Keys<N, UNIT>,
    ) -> usize {
        const { assert!((size_of::<T>() / UNIT).is_power_of_two() && size_of::<T>().is_multiple_of(UNIT)) };
        debug_assert!(ends.offsets.len() <= N && table.len().is_power_of_two());
        match self.level {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Vbmi2 => {
                // SAFETY: the level says that the processor has the instructions.
                if let Some(end) = unsafe { x86::keys_by_four::<ASK, N, UNIT, T>(text, ends, self.seed, table, to) } {
                    return end;
                }
            }
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 | Level::Avx512 => {
                // SAFETY: the same.
                if let Some(end) = unsafe { x86::keys::<ASK, N, UNIT, T>(text, ends, self.seed, table, to) } {
                    return end;
                }
            }
            _ => {}
        }
        let mut start = ends.start;
        for ((key, place), &offset) in to.keys.iter_mut().zip(&mut to.places).zip(ends.offsets) {
            let end = ends.base.wrapping_add(offset as usize);
            *key = pack_at(text, start, end.wrapping_sub(start));
            let at = self.place(*key, table.len());
            if ASK {
                prefetch(table, at);
            }
            *place = (at * (size_of::<T>() / UNIT)) as u32;
            start = end;
        }
        start
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
            // Up to the first end: the first word may begin before it.
            let base = base.min(start + lengths[0]);
            let ends: Vec<usize> = lengths.iter().scan(start, |end, length| { *end += length; Some(*end) }).collect();
            let last = ends.last().copied().unwrap_or(start);
            let text: Vec<u8> = (0..last + behind).map(|at| (at * 7 % 251) as u8).collect();
            let offsets: Vec<u32> = ends.iter().map(|end| (end - base) as u32).collect();
            for level in Level::ALL.into_iter().filter(|level| level.is_here()) {
                let (hasher, mut keys) = (Hasher::new(level, behind as u32), Keys::<64, 8>::default());
                let end = hasher.keys::<true, _, _, _>(&text, &Ends { start, base, offsets: &offsets }, &[[0u64; 4]; 64], &mut keys);
                prop_assert_eq!(end, last);
                let mut from = start;
                for (n, &end) in ends.iter().enumerate() {
                    prop_assert_eq!(keys.keys[n], pack(&text[from..end]).unwrap_or_default(), "{}", level.name());
                    prop_assert_eq!(keys.places[n] as usize, 4 * hasher.place(keys.keys[n], 64));
                    from = end;
                }
                let mut of_lines = Keys::<64, 1>::default();
                hasher.keys::<false, _, _, _>(&text, &Ends { start, base, offsets: &offsets }, &[[0u64; 8]; 64], &mut of_lines);
                prop_assert_eq!(of_lines.keys, keys.keys);
                prop_assert_eq!(of_lines.places, keys.places.map(|place| place / 4 * 64));
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
