//! Keys and their hashes by vectors: one word at a time by AVX2 and AES, four by AVX-512 and VAES.

use std::arch::x86_64::{
    __m128i, __m512i, _MM_HINT_T0, _mm_aesenc_si128, _mm_and_si128, _mm_cvtsi32_si128, _mm_cvtsi128_si32,
    _mm_load_si128, _mm_loadu_si128, _mm_or_si128, _mm_prefetch, _mm_set_epi64x, _mm_storeu_si128,
    _mm512_aesenc_epi128, _mm512_alignr_epi32, _mm512_and_si512, _mm512_broadcast_i32x4, _mm512_castsi128_si512,
    _mm512_cmple_epu32_mask, _mm512_cmplt_epu8_mask, _mm512_inserti32x4, _mm512_loadu_si512, _mm512_mask_mov_epi8,
    _mm512_maskz_mov_epi8, _mm512_maskz_mov_epi32, _mm512_permutexvar_epi8, _mm512_permutexvar_epi32,
    _mm512_set1_epi32, _mm512_sll_epi32, _mm512_storeu_si512, _mm512_sub_epi32, _mm512_unpacklo_epi32,
    _mm512_unpacklo_epi64, _mm512_xor_si512,
};

use super::{Ends, FIRST, Keys, PACKED};
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

/// What the two rounds of a hash mix in.
const MIXED: [[u64; 2]; 2] =
    [[0x2545_f491_4f6c_dd1d, 0x9e37_79b9_7f4a_7c15], [0x1656_67b1_9e37_79f9, 0xd1b5_4a32_d192_ed03]];

#[inline]
#[target_feature(enable = "avx2,aes")]
fn mixed(round: usize) -> __m128i {
    let [low, high] = MIXED[round];
    _mm_set_epi64x(high.cast_signed(), low.cast_signed())
}

#[inline]
#[target_feature(enable = "avx2,aes")]
fn hash_of(key: __m128i) -> u32 {
    let twice = _mm_aesenc_si128(_mm_aesenc_si128(key, mixed(0)), mixed(1));
    _mm_cvtsi128_si32(twice).cast_unsigned()
}

#[target_feature(enable = "avx2,aes")]
pub(super) fn hash(key: u128) -> u32 {
    hash_of(_mm_set_epi64x((key >> 64) as i64, key as i64))
}

/// Whether a load of 16 bytes is within `text` wherever one of the words begins.
///
/// They ascend, but all that follows depends on no word beginning behind the last.
#[inline]
fn are_within(text: &[u8], ends: &Ends<'_>) -> bool {
    let last = ends.offsets.iter().fold(0, |last, &offset| last.max(offset));
    let last = ends.base.wrapping_add(last as usize).max(ends.start);
    ends.base <= text.len() && last.checked_add(16).is_some_and(|end| end <= text.len())
}

/// `None` near the end of `text`: a key is one load of 16 bytes.
#[target_feature(enable = "avx2,aes,bmi1,bmi2")]
pub(super) fn keys<const ASK: bool, const N: usize, const UNIT: usize, T>(
    text: &[u8],
    ends: &Ends<'_>,
    seed: u32,
    table: &[T],
    to: &mut Keys<N, UNIT>,
) -> Option<usize> {
    if !are_within(text, ends) {
        return None;
    }
    let number = ends.offsets.len().min(N);
    // SAFETY: asked for above.
    Some(unsafe { keys_from::<ASK, N, UNIT, T>(0, number, ends.start, text, ends, seed, table, to) })
}

/// Words `from` to `number`, the first of which begins at `start`. Returns where the last one ends.
///
/// # Safety
/// [`are_within`]; `number` is at most `N` and the number of ends.
#[inline]
#[target_feature(enable = "avx2,aes,bmi1,bmi2")]
#[allow(clippy::too_many_arguments, reason = "two loops share it")]
unsafe fn keys_from<const ASK: bool, const N: usize, const UNIT: usize, T>(
    from: usize,
    number: usize,
    mut start: usize,
    text: &[u8],
    ends: &Ends<'_>,
    seed: u32,
    table: &[T],
    to: &mut Keys<N, UNIT>,
) -> usize {
    let mask = table.len().wrapping_sub(1) as u32;
    for n in from..number {
        // SAFETY: `n` is less than the lengths of all three.
        let (offset, key, place) =
            unsafe { (*ends.offsets.get_unchecked(n), to.keys.get_unchecked_mut(n), to.places.get_unchecked_mut(n)) };
        let end = ends.base.wrapping_add(offset as usize);
        let Length([kept, length]) = &LENGTHS[end.wrapping_sub(start).min(16)];
        // SAFETY: 16 bytes follow `start`, and the constants are aligned.
        let word = unsafe {
            let bytes = _mm_loadu_si128(text.as_ptr().add(start).cast());
            let bytes = _mm_and_si128(bytes, _mm_load_si128(std::ptr::from_ref(kept).cast()));
            _mm_or_si128(bytes, _mm_load_si128(std::ptr::from_ref(length).cast()))
        };
        let at = (hash_of(word) ^ seed) & mask;
        if ASK {
            prefetch(table, at as usize);
        }
        // SAFETY: a key has 16 bytes.
        unsafe { _mm_storeu_si128(std::ptr::from_mut(key).cast(), word) };
        *place = at * (size_of::<T>() / UNIT) as u32;
        start = end;
    }
    start
}

/// Words whose ends are in one register.
const WORDS: usize = 16;

/// Bytes 0 to 15 in each quarter.
const IN_KEY: [u8; 64] = {
    let mut bytes = [0; 64];
    let mut n = 0;
    while n < 64 {
        bytes[n] = n as u8 % 16;
        n += 1;
    }
    bytes
};

/// Of each byte of the four keys of a quarter of [`WORDS`] where its length is.
const OF_LENGTHS: [[u8; 64]; 4] = {
    let mut places = [[0; 64]; 4];
    let mut n = 0;
    while n < 256 {
        places[n / 64][n % 64] = (n / 16 * 4) as u8;
        n += 1;
    }
    places
};

/// Rows for columns of a square of four.
const TURNED: [u32; WORDS] = [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15];

/// As [`keys`], with the same results.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,vaes,avx2,aes,bmi1,bmi2")]
pub(super) fn keys_by_four<const ASK: bool, const N: usize, const UNIT: usize, T>(
    text: &[u8],
    ends: &Ends<'_>,
    seed: u32,
    table: &[T],
    to: &mut Keys<N, UNIT>,
) -> Option<usize> {
    if !are_within(text, ends) {
        return None;
    }
    let number = ends.offsets.len().min(N);
    let Some(mut last) = ends.start.checked_sub(ends.base).and_then(|start| u32::try_from(start).ok()) else {
        // SAFETY: asked for above.
        return Some(unsafe { keys_from::<ASK, N, UNIT, T>(0, number, ends.start, text, ends, seed, table, to) });
    };
    // SAFETY: of constants of 64 bytes.
    let load = |constant: *const u8| unsafe { _mm512_loadu_si512(constant.cast()) };
    let in_key = load(IN_KEY.as_ptr());
    let (first, second) = (_mm512_broadcast_i32x4(mixed(0)), _mm512_broadcast_i32x4(mixed(1)));
    let of_lengths = OF_LENGTHS.each_ref().map(|places| load(places.as_ptr()));
    let turned = load(TURNED.as_ptr().cast());
    let seeds = _mm512_set1_epi32(seed.cast_signed());
    let mask = _mm512_set1_epi32((table.len().wrapping_sub(1) as u32).cast_signed());
    let most = _mm512_set1_epi32((PACKED as u32).cast_signed());
    let shift = _mm_cvtsi32_si128((size_of::<T>() / UNIT).trailing_zeros().cast_signed());
    let base = text.as_ptr().wrapping_add(ends.base);
    let mut n = 0;
    while n + WORDS <= number {
        // SAFETY: 16 ends from `n` on; each word begins where one of the ends before it is, and 16 bytes are there.
        unsafe {
            let to_ends = _mm512_loadu_si512(ends.offsets.as_ptr().add(n).cast());
            let begins = _mm512_alignr_epi32::<15>(to_ends, _mm512_set1_epi32(last.cast_signed()));
            let lengths = _mm512_sub_epi32(to_ends, begins);
            let lengths = _mm512_maskz_mov_epi32(_mm512_cmple_epu32_mask(lengths, most), lengths);
            let mut at = [0u32; WORDS];
            _mm512_storeu_si512(at.as_mut_ptr().cast(), begins);
            let word = |n: usize| _mm_loadu_si128(base.add(at[n] as usize).cast());
            let mut hashes = [_mm512_set1_epi32(0); 4];
            for (quarter, hash) in hashes.iter_mut().enumerate() {
                let four = _mm512_castsi128_si512(word(4 * quarter));
                let four = _mm512_inserti32x4::<1>(four, word(4 * quarter + 1));
                let four = _mm512_inserti32x4::<2>(four, word(4 * quarter + 2));
                let four = _mm512_inserti32x4::<3>(four, word(4 * quarter + 3));
                let lengths = _mm512_permutexvar_epi8(of_lengths[quarter], lengths);
                let kept = _mm512_maskz_mov_epi8(_mm512_cmplt_epu8_mask(in_key, lengths), four);
                let key = _mm512_mask_mov_epi8(kept, 0x8000_8000_8000_8000, lengths);
                _mm512_storeu_si512(to.keys.as_mut_ptr().add(n + 4 * quarter).cast(), key);
                *hash = _mm512_aesenc_epi128(_mm512_aesenc_epi128(key, first), second);
            }
            let hashes = _mm512_xor_si512(first_of_quarters(hashes, turned), seeds);
            let places = to.places.as_mut_ptr().add(n);
            _mm512_storeu_si512(places.cast(), _mm512_sll_epi32(_mm512_and_si512(hashes, mask), shift));
            for n in 0..if ASK { WORDS } else { 0 } {
                // Read back from memory: to take a register apart is dearer.
                let place = places.add(n).read_volatile() as usize * UNIT;
                _mm_prefetch::<_MM_HINT_T0>(table.as_ptr().cast::<i8>().wrapping_add(place));
            }
            last = *ends.offsets.get_unchecked(n + WORDS - 1);
        }
        n += WORDS;
    }
    // SAFETY: asked for above.
    Some(unsafe {
        keys_from::<ASK, N, UNIT, T>(n, number, ends.base.wrapping_add(last as usize), text, ends, seed, table, to)
    })
}

/// The first number of each quarter of each register, in order.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn first_of_quarters([a, b, c, d]: [__m512i; 4], turned: __m512i) -> __m512i {
    let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
    _mm512_permutexvar_epi32(turned, _mm512_unpacklo_epi64(ab, cd))
}
