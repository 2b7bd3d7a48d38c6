//! [`Lanes`] of AVX2 and AVX-512, and the places where they may be used.

use std::arch::x86_64::{
    __m256i, _mm256_cmpeq_epi8, _mm256_loadu_si256, _mm256_min_epu8, _mm256_movemask_epi8, _mm256_or_si256,
    _mm256_set1_epi8, _mm256_sub_epi8, _mm512_add_epi32, _mm512_castsi512_si128, _mm512_cmpeq_epi8_mask,
    _mm512_cmple_epu8_mask, _mm512_cmplt_epu8_mask, _mm512_cvtepu8_epi32, _mm512_extracti32x4_epi32,
    _mm512_loadu_si512, _mm512_maskz_compress_epi8, _mm512_movepi8_mask, _mm512_or_si512, _mm512_set1_epi8,
    _mm512_set1_epi32, _mm512_storeu_si512, _mm512_sub_epi8,
};

use super::blocks::{Hand, Rules, ends_with};
use super::lanes::{BLOCK, Lanes};

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,avx2,bmi1,bmi2,lzcnt,popcnt")]
pub(super) fn ends_avx512_vbmi2<R: Rules>(bytes: &[u8], f: Hand<'_>) {
    ends_with::<R>(Compress(Avx512(())), bytes, f);
}

#[target_feature(enable = "avx512f,avx512bw,avx2,bmi1,bmi2,lzcnt,popcnt")]
pub(super) fn ends_avx512<R: Rules>(bytes: &[u8], f: Hand<'_>) {
    ends_with::<R>(Avx512(()), bytes, f);
}

#[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt")]
pub(super) fn ends_avx2<R: Rules>(bytes: &[u8], f: Hand<'_>) {
    ends_with::<R>(Avx2(()), bytes, f);
}

#[derive(Clone, Copy)]
struct Avx512(());

impl Lanes for Avx512 {
    #[inline(always)]
    fn within(self, block: &[u8; BLOCK], from: u8, to: u8) -> u64 {
        // SAFETY: only `ends_avx512` and `ends_avx512_vbmi2` make an `Avx512`; 64 bytes are there. So below.
        unsafe {
            let away = _mm512_sub_epi8(_mm512_loadu_si512(block.as_ptr().cast()), _mm512_set1_epi8(from.cast_signed()));
            _mm512_cmple_epu8_mask(away, _mm512_set1_epi8((to - from).cast_signed()))
        }
    }

    #[inline(always)]
    fn letters(self, block: &[u8; BLOCK]) -> u64 {
        // SAFETY: as above.
        unsafe {
            let lower = _mm512_or_si512(_mm512_loadu_si512(block.as_ptr().cast()), _mm512_set1_epi8(0x20));
            _mm512_cmplt_epu8_mask(_mm512_sub_epi8(lower, _mm512_set1_epi8(0x61)), _mm512_set1_epi8(26))
        }
    }

    #[inline(always)]
    fn equal(self, block: &[u8; BLOCK], byte: u8) -> u64 {
        // SAFETY: as above.
        unsafe {
            _mm512_cmpeq_epi8_mask(_mm512_loadu_si512(block.as_ptr().cast()), _mm512_set1_epi8(byte.cast_signed()))
        }
    }

    #[inline(always)]
    fn equal_lower(self, block: &[u8; BLOCK], byte: u8) -> u64 {
        // SAFETY: as above.
        unsafe {
            let lower = _mm512_or_si512(_mm512_loadu_si512(block.as_ptr().cast()), _mm512_set1_epi8(0x20));
            _mm512_cmpeq_epi8_mask(lower, _mm512_set1_epi8(byte.cast_signed()))
        }
    }

    #[inline(always)]
    fn high(self, block: &[u8; BLOCK]) -> u64 {
        // SAFETY: as above.
        unsafe { _mm512_movepi8_mask(_mm512_loadu_si512(block.as_ptr().cast())) }
    }
}

/// AVX-512 with VBMI 2: numbers of bytes are packed by one instruction, in a register.
#[derive(Clone, Copy)]
struct Compress(Avx512);

const NUMBERS: [u8; BLOCK] = {
    let mut numbers = [0; BLOCK];
    let mut i = 0;
    while i < BLOCK {
        numbers[i] = i as u8;
        i += 1;
    }
    numbers
};

impl Lanes for Compress {
    #[inline(always)]
    fn within(self, block: &[u8; BLOCK], from: u8, to: u8) -> u64 {
        self.0.within(block, from, to)
    }

    #[inline(always)]
    fn letters(self, block: &[u8; BLOCK]) -> u64 {
        self.0.letters(block)
    }

    #[inline(always)]
    fn equal(self, block: &[u8; BLOCK], byte: u8) -> u64 {
        self.0.equal(block, byte)
    }

    #[inline(always)]
    fn equal_lower(self, block: &[u8; BLOCK], byte: u8) -> u64 {
        self.0.equal_lower(block, byte)
    }

    #[inline(always)]
    fn high(self, block: &[u8; BLOCK]) -> u64 {
        self.0.high(block)
    }

    #[inline(always)]
    fn flatten(self, mask: u64, base: u32, out: &mut [u32; BLOCK]) -> usize {
        let count = mask.count_ones() as usize;
        // SAFETY: only `ends_avx512_vbmi2` makes a `Compress`; `out` has room for all four stores.
        unsafe {
            let packed = _mm512_maskz_compress_epi8(mask, _mm512_loadu_si512(NUMBERS.as_ptr().cast()));
            let base = _mm512_set1_epi32(base.cast_signed());
            let out = out.as_mut_ptr();
            _mm512_storeu_si512(
                out.cast(),
                _mm512_add_epi32(base, _mm512_cvtepu8_epi32(_mm512_castsi512_si128(packed))),
            );
            if count > 16 {
                let more = _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32::<1>(packed));
                _mm512_storeu_si512(out.add(16).cast(), _mm512_add_epi32(base, more));
            }
            if count > 32 {
                let more = _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32::<2>(packed));
                _mm512_storeu_si512(out.add(32).cast(), _mm512_add_epi32(base, more));
                let more = _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32::<3>(packed));
                _mm512_storeu_si512(out.add(48).cast(), _mm512_add_epi32(base, more));
            }
        }
        count
    }
}

#[derive(Clone, Copy)]
struct Avx2(());

/// 64 bytes. No closures here: what is not inlined would be compiled without the instructions.
type Halves = (__m256i, __m256i);

impl Avx2 {
    #[inline(always)]
    fn load(block: &[u8; BLOCK]) -> Halves {
        // SAFETY: only `ends_avx2` makes an `Avx2`; 64 bytes are there. So below.
        unsafe { (_mm256_loadu_si256(block.as_ptr().cast()), _mm256_loadu_si256(block.as_ptr().add(32).cast())) }
    }

    #[inline(always)]
    fn all(byte: u8) -> __m256i {
        // SAFETY: as above.
        unsafe { _mm256_set1_epi8(byte.cast_signed()) }
    }

    #[inline(always)]
    fn lower((low, high): Halves) -> Halves {
        // SAFETY: as above.
        unsafe { (_mm256_or_si256(low, Self::all(0x20)), _mm256_or_si256(high, Self::all(0x20))) }
    }

    /// The top bits.
    #[inline(always)]
    fn gather((low, high): Halves) -> u64 {
        // SAFETY: as above.
        unsafe {
            u64::from(_mm256_movemask_epi8(low).cast_unsigned())
                | u64::from(_mm256_movemask_epi8(high).cast_unsigned()) << 32
        }
    }

    #[inline(always)]
    fn are_within(x: Halves, from: u8, to: u8) -> u64 {
        // SAFETY: as above.
        unsafe {
            let (low, high) = (_mm256_sub_epi8(x.0, Self::all(from)), _mm256_sub_epi8(x.1, Self::all(from)));
            let most = Self::all(to - from);
            Self::gather((
                _mm256_cmpeq_epi8(_mm256_min_epu8(low, most), low),
                _mm256_cmpeq_epi8(_mm256_min_epu8(high, most), high),
            ))
        }
    }

    #[inline(always)]
    fn are_equal(x: Halves, byte: u8) -> u64 {
        // SAFETY: as above.
        unsafe { Self::gather((_mm256_cmpeq_epi8(x.0, Self::all(byte)), _mm256_cmpeq_epi8(x.1, Self::all(byte)))) }
    }
}

impl Lanes for Avx2 {
    #[inline(always)]
    fn within(self, block: &[u8; BLOCK], from: u8, to: u8) -> u64 {
        Self::are_within(Self::load(block), from, to)
    }

    #[inline(always)]
    fn letters(self, block: &[u8; BLOCK]) -> u64 {
        Self::are_within(Self::lower(Self::load(block)), b'a', b'z')
    }

    #[inline(always)]
    fn equal(self, block: &[u8; BLOCK], byte: u8) -> u64 {
        Self::are_equal(Self::load(block), byte)
    }

    #[inline(always)]
    fn equal_lower(self, block: &[u8; BLOCK], byte: u8) -> u64 {
        Self::are_equal(Self::lower(Self::load(block)), byte)
    }

    #[inline(always)]
    fn high(self, block: &[u8; BLOCK]) -> u64 {
        Self::gather(Self::load(block))
    }
}

#[cfg(test)]
mod tests {
    use super::super::lanes::tests::hold;
    use super::{Avx2, Avx512, Compress};
    use bytekiln_simd::Level;

    #[test]
    fn vectors_compare_as_one_by_one() {
        if Level::Avx2.is_here() {
            hold(Avx2(()));
        }
        if Level::Avx512.is_here() {
            hold(Avx512(()));
        }
        if Level::Avx512Vbmi2.is_here() {
            hold(Compress(Avx512(())));
        }
    }
}
