//! Rounds of [`lockstep`](super::lockstep) with a word's ids and ranks in a register each, by AVX-512.
//!
//! What the plain rounds store rank by rank into a row, and then load as a whole, which waits for the stores, is written into a
//! register here, and one instruction takes a place out and closes the gap. In: words that are being merged.
//! Out: the same, merged. Called by `lockstep`, whose plain rounds are the specification.

#![allow(unsafe_code, reason = "vector instructions; held to the specification by the property test of `lockstep`")]
#![allow(clippy::undocumented_unsafe_blocks, reason = "all for one reason, which stands in front of the first")]
#![allow(clippy::inline_always, reason = "takes on the instructions of whoever calls it")]

use std::arch::x86_64::{
    __m256i, __m512i, _mm_cvtsi128_si32, _mm_minpos_epu16, _mm256_castsi256_si128, _mm256_extracti128_si256,
    _mm256_loadu_si256, _mm256_mask_compress_epi16, _mm256_mask_set1_epi16, _mm256_set1_epi16, _mm256_storeu_si256,
    _mm512_cmpeq_epi32_mask, _mm512_loadu_si512, _mm512_mask_compress_epi32, _mm512_mask_set1_epi32,
    _mm512_reduce_min_epu32, _mm512_set1_epi32, _mm512_storeu_si512,
};

use super::lockstep::{PLACES, ROOM};

/// [`PLACES`] numbers in a register. Only where the processor has AVX-512 with VBMI 2 and VL.
pub(crate) trait InRegisters: Copy {
    /// The register.
    type Register: Copy;

    unsafe fn load(from: &[Self; ROOM]) -> Self::Register;
    unsafe fn store(row: Self::Register, to: &mut [Self; ROOM]);
    /// With the number at the place whose bit is set, if one of them is.
    unsafe fn with(row: Self::Register, place: u32, number: Self) -> Self::Register;
    /// Without the place whose bit is set: what is behind moves up, and the greatest number behind that.
    unsafe fn without(row: Self::Register, place: u32) -> Self::Register;
    /// The lowest, and the first place where it stands.
    unsafe fn lowest_in(row: Self::Register) -> (Self, usize);
}

const _: () = assert!(PLACES == 16, "as many as a register has lanes");

// SAFETY of all that follows: the caller has the instructions; a row has room for more than a register.
impl InRegisters for u16 {
    type Register = __m256i;

    #[inline(always)]
    unsafe fn load(from: &[Self; ROOM]) -> __m256i {
        unsafe { _mm256_loadu_si256(from.as_ptr().cast()) }
    }

    #[inline(always)]
    unsafe fn store(row: __m256i, to: &mut [Self; ROOM]) {
        unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), row) };
    }

    #[inline(always)]
    unsafe fn with(row: __m256i, place: u32, number: Self) -> __m256i {
        unsafe { _mm256_mask_set1_epi16(row, place as u16, number.cast_signed()) }
    }

    #[inline(always)]
    unsafe fn without(row: __m256i, place: u32) -> __m256i {
        unsafe { _mm256_mask_compress_epi16(_mm256_set1_epi16(Self::MAX.cast_signed()), !place as u16, row) }
    }

    #[inline(always)]
    unsafe fn lowest_in(row: __m256i) -> (Self, usize) {
        // Of eight numbers the lowest, and its place above it: turned round, one comparison finds both.
        let (low, high) = unsafe {
            (_mm_minpos_epu16(_mm256_castsi256_si128(row)), _mm_minpos_epu16(_mm256_extracti128_si256::<1>(row)))
        };
        let turned = |found| unsafe { _mm_cvtsi128_si32(found) }.cast_unsigned().rotate_left(16);
        let lowest = turned(low).min(turned(high) | 8);
        ((lowest >> 16) as Self, (lowest & 0xffff) as usize)
    }
}

impl InRegisters for u32 {
    type Register = __m512i;

    #[inline(always)]
    unsafe fn load(from: &[Self; ROOM]) -> __m512i {
        unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
    }

    #[inline(always)]
    unsafe fn store(row: __m512i, to: &mut [Self; ROOM]) {
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), row) };
    }

    #[inline(always)]
    unsafe fn with(row: __m512i, place: u32, number: Self) -> __m512i {
        unsafe { _mm512_mask_set1_epi32(row, place as u16, number.cast_signed()) }
    }

    #[inline(always)]
    unsafe fn without(row: __m512i, place: u32) -> __m512i {
        unsafe { _mm512_mask_compress_epi32(_mm512_set1_epi32(Self::MAX.cast_signed()), !place as u16, row) }
    }

    #[inline(always)]
    unsafe fn lowest_in(row: __m512i) -> (Self, usize) {
        let lowest = unsafe { _mm512_reduce_min_epu32(row) };
        let places = unsafe { _mm512_cmpeq_epi32_mask(row, _mm512_set1_epi32(lowest.cast_signed())) };
        (lowest, places.trailing_zeros() as usize)
    }
}
