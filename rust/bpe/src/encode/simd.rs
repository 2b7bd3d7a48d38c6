//! The lowest of a window's ranks and all its places, by the vector instructions that the processor has.
//!
//! In: 64 ranks. Out: the lowest, and a bit for each place where it stands. `lowest_plainly` is the specification.

#![allow(unsafe_code, reason = "vector instructions; held to the plain loop by a property test")]

use bytekiln_simd::Level;

use super::window::WINDOW;

/// Any width, without instructions by name.
pub(super) fn lowest_plainly<T: Copy + Ord>(ranks: &[T; WINDOW]) -> (T, u64) {
    let lowest = ranks.iter().skip(1).fold(ranks[0], |lowest, &rank| lowest.min(rank));
    let places = ranks.iter().enumerate().fold(0, |places, (at, &rank)| places | u64::from(rank == lowest) << at);
    (lowest, places)
}

/// Of ranks of two bytes.
#[inline]
pub(super) fn lowest_narrow(ranks: &[u16; WINDOW], level: Level) -> (u16, u64) {
    match level {
        // SAFETY: the level says that the processor has the instructions.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx512Vbmi2 => unsafe { x86::narrow_avx512(ranks) },
        // SAFETY: the same.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { x86::narrow_avx2(ranks) },
        _ => lowest_plainly(ranks),
    }
}

/// Of ranks of four bytes.
#[inline]
pub(super) fn lowest_wide(ranks: &[u32; WINDOW], level: Level) -> (u32, u64) {
    match level {
        // SAFETY: the level says that the processor has the instructions.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx512Vbmi2 => unsafe { x86::wide_avx512(ranks) },
        // SAFETY: the same.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { x86::wide_avx2(ranks) },
        _ => lowest_plainly(ranks),
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m128i, _mm_cvtsi128_si32, _mm_min_epu16, _mm_min_epu32, _mm_minpos_epu16, _mm_shuffle_epi32,
        _mm256_castsi256_ps, _mm256_castsi256_si128, _mm256_cmpeq_epi16, _mm256_cmpeq_epi32, _mm256_extracti128_si256,
        _mm256_loadu_si256, _mm256_min_epu16, _mm256_min_epu32, _mm256_movemask_epi8, _mm256_movemask_ps,
        _mm256_packs_epi16, _mm256_permute4x64_epi64, _mm256_set1_epi16, _mm256_set1_epi32, _mm512_castsi512_si256,
        _mm512_cmpeq_epi16_mask, _mm512_cmpeq_epi32_mask, _mm512_extracti64x4_epi64, _mm512_loadu_si512,
        _mm512_min_epu16, _mm512_min_epu32, _mm512_reduce_min_epu32, _mm512_set1_epi16, _mm512_set1_epi32,
    };

    use super::WINDOW;

    /// The lowest of 8 ranks, in every lane of the result's lowest 16 bits.
    #[target_feature(enable = "avx2")]
    fn of_eight(ranks: __m128i) -> u16 {
        _mm_cvtsi128_si32(_mm_minpos_epu16(ranks)).cast_unsigned() as u16
    }

    #[target_feature(enable = "avx2,avx512f,avx512bw")]
    pub(super) fn narrow_avx512(ranks: &[u16; WINDOW]) -> (u16, u64) {
        // SAFETY: 64 ranks are two registers; unaligned loads.
        let (a, b) =
            unsafe { (_mm512_loadu_si512(ranks.as_ptr().cast()), _mm512_loadu_si512(ranks[32..].as_ptr().cast())) };
        let lower = _mm512_min_epu16(a, b);
        let lower = _mm256_min_epu16(_mm512_castsi512_si256(lower), _mm512_extracti64x4_epi64::<1>(lower));
        let lowest = of_eight(_mm_min_epu16(_mm256_castsi256_si128(lower), _mm256_extracti128_si256::<1>(lower)));
        let all = _mm512_set1_epi16(lowest.cast_signed());
        let places = u64::from(_mm512_cmpeq_epi16_mask(a, all)) | u64::from(_mm512_cmpeq_epi16_mask(b, all)) << 32;
        (lowest, places)
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn narrow_avx2(ranks: &[u16; WINDOW]) -> (u16, u64) {
        // SAFETY: 16 ranks from each of four places; unaligned loads.
        let part = |at: usize| unsafe { _mm256_loadu_si256(ranks[at..at + 16].as_ptr().cast()) };
        let (a, b, c, d) = (part(0), part(16), part(32), part(48));
        let lower = _mm256_min_epu16(_mm256_min_epu16(a, b), _mm256_min_epu16(c, d));
        let lowest = of_eight(_mm_min_epu16(_mm256_castsi256_si128(lower), _mm256_extracti128_si256::<1>(lower)));
        let all = _mm256_set1_epi16(lowest.cast_signed());
        // Packing works in halves of 128 bits: the quarters are put back in their order.
        let places = |a, b| {
            let bytes = _mm256_packs_epi16(_mm256_cmpeq_epi16(a, all), _mm256_cmpeq_epi16(b, all));
            u64::from(_mm256_movemask_epi8(_mm256_permute4x64_epi64::<0b11_01_10_00>(bytes)).cast_unsigned())
        };
        (lowest, places(a, b) | places(c, d) << 32)
    }

    #[target_feature(enable = "avx2,avx512f")]
    pub(super) fn wide_avx512(ranks: &[u32; WINDOW]) -> (u32, u64) {
        // SAFETY: 16 ranks from each of four places; unaligned loads.
        let part = |at: usize| unsafe { _mm512_loadu_si512(ranks[at..at + 16].as_ptr().cast()) };
        let (a, b, c, d) = (part(0), part(16), part(32), part(48));
        let lowest = _mm512_reduce_min_epu32(_mm512_min_epu32(_mm512_min_epu32(a, b), _mm512_min_epu32(c, d)));
        let all = _mm512_set1_epi32(lowest.cast_signed());
        let places = |part| u64::from(_mm512_cmpeq_epi32_mask(part, all));
        (lowest, places(a) | places(b) << 16 | places(c) << 32 | places(d) << 48)
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn wide_avx2(ranks: &[u32; WINDOW]) -> (u32, u64) {
        // SAFETY: 8 ranks from each of eight places; unaligned loads.
        let part = |at: usize| unsafe { _mm256_loadu_si256(ranks[at..at + 8].as_ptr().cast()) };
        let mut lower = part(0);
        for at in (8..WINDOW).step_by(8) {
            lower = _mm256_min_epu32(lower, part(at));
        }
        let four = _mm_min_epu32(_mm256_castsi256_si128(lower), _mm256_extracti128_si256::<1>(lower));
        let two = _mm_min_epu32(four, _mm_shuffle_epi32::<0b01_00_11_10>(four));
        let one = _mm_min_epu32(two, _mm_shuffle_epi32::<0b10_11_00_01>(two));
        let lowest = _mm_cvtsi128_si32(one).cast_unsigned();
        let all = _mm256_set1_epi32(lowest.cast_signed());
        let mut places = 0;
        for at in (0..WINDOW).step_by(8) {
            let equal = _mm256_castsi256_ps(_mm256_cmpeq_epi32(part(at), all));
            places |= u64::from(_mm256_movemask_ps(equal).cast_unsigned()) << at;
        }
        (lowest, places)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_level_finds_what_the_plain_loop_finds(
            few in prop::array::uniform32(0u32..4),
            many in prop::array::uniform32(any::<u32>()),
        ) {
            for ranks in [[few, few], [many, few], [many, many], [[u32::MAX; 32], few], [[u32::MAX; 32]; 2]] {
                let ranks: [u32; WINDOW] = ranks.concat().try_into().unwrap();
                let narrow = ranks.map(|rank| rank.min(u32::from(u16::MAX)) as u16);
                for level in Level::ALL.into_iter().filter(|level| level.is_here()) {
                    prop_assert_eq!(lowest_wide(&ranks, level), lowest_plainly(&ranks), "{}", level.name());
                    prop_assert_eq!(lowest_narrow(&narrow, level), lowest_plainly(&narrow), "{}", level.name());
                }
            }
        }
    }
}
