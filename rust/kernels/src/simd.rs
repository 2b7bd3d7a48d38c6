//! Vectors of floats, and the choice of instructions at run time.
//!
//! A kernel is a [`Job`], generic over [`Lanes`]; [`run`] compiles it once a level, inside a function that may
//! use the level's instructions. For that everything a job calls is `#[inline(always)]`: code that is not inlined
//! there would be compiled for the least processor.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m256, __m512, _CMP_UNORD_Q, _mm_add_ps, _mm_add_ss, _mm_cvtss_f32, _mm_loadu_si128, _mm_max_ps, _mm_max_ss,
    _mm_movehl_ps, _mm_shuffle_ps, _mm_storeu_si128, _mm256_add_epi32, _mm256_add_ps, _mm256_and_si256,
    _mm256_blendv_epi8, _mm256_blendv_ps, _mm256_castpd_ps, _mm256_castps_si256, _mm256_castps256_ps128,
    _mm256_castsi256_ps, _mm256_castsi256_si128, _mm256_cmp_ps, _mm256_cvtepu16_epi32, _mm256_div_ps,
    _mm256_extractf128_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256, _mm256_max_ps, _mm256_min_ps,
    _mm256_mul_ps, _mm256_or_si256, _mm256_packus_epi32, _mm256_permute2f128_ps, _mm256_permute4x64_epi64,
    _mm256_set1_epi32, _mm256_set1_ps, _mm256_shuffle_ps, _mm256_slli_epi32, _mm256_srli_epi32, _mm256_storeu_ps,
    _mm256_storeu_si256, _mm256_sub_ps, _mm256_unpackhi_ps, _mm256_unpacklo_ps, _mm512_add_epi32, _mm512_add_ps,
    _mm512_and_si512, _mm512_castps_pd, _mm512_castps_si512, _mm512_castps512_ps256, _mm512_castsi512_ps,
    _mm512_cmp_ps_mask, _mm512_cmplt_epi32_mask, _mm512_cvtepi32_epi16, _mm512_cvtepu16_epi32, _mm512_div_ps,
    _mm512_extractf64x4_pd, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_mask_blend_ps, _mm512_mask_or_epi32,
    _mm512_max_ps, _mm512_min_ps, _mm512_mul_ps, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_si512,
    _mm512_slli_epi32, _mm512_srli_epi32, _mm512_storeu_ps, _mm512_sub_ps,
};

pub use bytekiln_simd::{Level, VARIABLE};

/// The widest vector of any level.
pub(crate) const MOST_LANES: usize = 16;

/// Runs a job with a level's vectors.
pub(crate) fn run<J: Job>(level: Level, job: J) -> J::Out {
    assert!(level.is_here(), "{VARIABLE}: found {} on a processor without it", level.name());
    match level {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has AVX2 and FMA, as was just asserted.
        Level::Avx2 => unsafe { on_avx2(job) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has AVX-512 F, as was just asserted.
        Level::Avx512 | Level::Avx512Vbmi2 => unsafe { on_avx512(job) },
        _ => job.run(Portable(())),
    }
}

/// A piece of work that does not know its vectors. `run` must be `#[inline(always)]`.
pub(crate) trait Job {
    /// What comes out.
    type Out;
    /// Do it.
    fn run<L: Lanes>(self, lanes: L) -> Self::Out;
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn on_avx2<J: Job>(job: J) -> J::Out {
    job.run(Avx2(()))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
fn on_avx512<J: Job>(job: J) -> J::Out {
    job.run(Avx512(()))
}

/// Arithmetic on vectors of `WIDTH` floats. A value of such a type is the proof that the processor can do it: only
/// [`run`] makes one, after it has asked.
pub(crate) trait Lanes: Copy {
    /// A vector.
    type V: Copy;
    /// Floats in it.
    const WIDTH: usize;
    /// All lanes the same.
    fn splat(self, x: f32) -> Self::V;
    /// # Safety
    /// `WIDTH` floats can be read at `from`, which needs no alignment.
    unsafe fn load(self, from: *const f32) -> Self::V;
    /// # Safety
    /// `WIDTH` floats can be written at `to`, which needs no alignment.
    unsafe fn store(self, to: *mut f32, v: Self::V);
    /// `WIDTH` bf16 numbers, the upper halves of floats.
    ///
    /// # Safety
    /// They can be read at `from`.
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u16) -> Self::V {
        let mut wide = [0.0; MOST_LANES];
        for (i, wide) in wide.iter_mut().enumerate().take(Self::WIDTH) {
            // SAFETY: the caller's.
            *wide = f32::from_bits(u32::from(unsafe { from.add(i).read_unaligned() }) << 16);
        }
        // SAFETY: the array holds the widest vector.
        unsafe { self.load(wide.as_ptr()) }
    }
    /// The nearest bf16 numbers, ties to even; NaN stays NaN.
    ///
    /// # Safety
    /// `WIDTH` can be written at `to`.
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16, v: Self::V) {
        for (i, x) in self.spread(v).into_iter().enumerate().take(Self::WIDTH) {
            // SAFETY: the caller's.
            unsafe { to.add(i).write_unaligned(to_bf16(x)) };
        }
    }
    /// a + b.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// a - b.
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// a · b.
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// a / b.
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// a · b + c, rounded once where the level has FMA.
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The greater; b where either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The less; b where either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// a where the sign bit of `of` is set, else b.
    fn where_negative(self, of: Self::V, a: Self::V, b: Self::V) -> Self::V;
    /// 2ⁿ for the whole n that stands in the low bits of n + 1.5·2²³; 0 for n = -127.
    fn power_of_two(self, shifted: Self::V) -> Self::V;

    /// The transpose of 8 × 8 floats, one at a time unless the level knows better.
    ///
    /// # Safety
    /// Eight rows of eight floats can be read at `from`, `from_row` apart, and written at `to`, `to_row` apart.
    #[inline(always)]
    unsafe fn turn(self, from: *const f32, from_row: usize, to: *mut f32, to_row: usize) {
        for i in 0..8 {
            for j in 0..8 {
                // SAFETY: the caller's.
                unsafe { *to.add(i * to_row + j) = *from.add(j * from_row + i) }
            }
        }
    }

    /// The floats of a vector.
    #[inline(always)]
    fn spread(self, v: Self::V) -> [f32; MOST_LANES] {
        let mut out = [0.0; MOST_LANES];
        // SAFETY: the array holds the widest vector.
        unsafe { self.store(out.as_mut_ptr(), v) };
        out
    }

    /// Sum of the lanes, halves first: the order is fixed.
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        let mut x = self.spread(v);
        let mut half = Self::WIDTH / 2;
        while half > 0 {
            for i in 0..half {
                x[i] += x[i + half];
            }
            half /= 2;
        }
        x[0]
    }

    /// The greatest lane; NaN lanes may be passed over.
    #[inline(always)]
    fn greatest(self, v: Self::V) -> f32 {
        let x = self.spread(v);
        x[..Self::WIDTH].iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }

    /// 2ᶻ, relative error below 1.3e-7; 0 below 2⁻¹²⁶, 2¹²⁷ from z = 127 on, NaN for NaN.
    ///
    /// z = n + f with |f| ≤ 1/2; 2ᶠ by a polynomial (minimax, 2e-9), 2ⁿ by its bits.
    #[inline(always)]
    fn exp2(self, z: Self::V) -> Self::V {
        const SHIFT: f32 = 12_582_912.0; // 1.5·2²³: adding it rounds to a whole number
        let z = self.min(self.splat(127.0), self.max(self.splat(-127.0), z));
        let shifted = self.add(z, self.splat(SHIFT));
        let f = self.sub(z, self.sub(shifted, self.splat(SHIFT)));
        let mut p = self.splat(1.535_336_2e-4);
        for c in [1.339_887_4e-3, 9.618_437e-3, 5.550_332_5e-2, 2.402_264_8e-1, 6.931_472e-1, 1.0] {
            p = self.mul_add(p, f, self.splat(c));
        }
        self.mul(p, self.power_of_two(shifted))
    }
}

/// The nearest bf16 number, ties to even; NaN stays NaN.
#[inline(always)]
pub(crate) fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    // Of NaN the carry could make another number.
    if x.is_nan() { (bits >> 16 | 0x40) as u16 } else { (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16 }
}

/// The level without instructions to ask for: four floats, which compilers turn into SSE2 or NEON.
#[derive(Clone, Copy)]
pub(crate) struct Portable(());

/// Lane by lane.
#[inline(always)]
fn each(f: impl Fn(usize) -> f32) -> [f32; 4] {
    [f(0), f(1), f(2), f(3)]
}

impl Lanes for Portable {
    type V = [f32; 4];
    const WIDTH: usize = 4;
    #[inline(always)]
    fn splat(self, x: f32) -> [f32; 4] {
        [x; 4]
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> [f32; 4] {
        // SAFETY: the caller's; four floats need no more alignment than one.
        unsafe { from.cast::<[f32; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, v: [f32; 4]) {
        // SAFETY: the caller's.
        unsafe { to.cast::<[f32; 4]>().write_unaligned(v) }
    }
    #[inline(always)]
    fn add(self, a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        each(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        each(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        each(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        each(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn mul_add(self, a: [f32; 4], b: [f32; 4], c: [f32; 4]) -> [f32; 4] {
        // Without the instruction `f32::mul_add` calls a function that takes fifty times as long.
        if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
            each(|i| a[i].mul_add(b[i], c[i]))
        } else {
            each(|i| a[i] * b[i] + c[i])
        }
    }
    #[inline(always)]
    fn max(self, a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        each(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn min(self, a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        each(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn where_negative(self, of: [f32; 4], a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        each(|i| if of[i].is_sign_negative() { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn power_of_two(self, shifted: [f32; 4]) -> [f32; 4] {
        each(|i| f32::from_bits((shifted[i].to_bits() << 23).wrapping_add(0x3f80_0000)))
    }
}

/// A level's vectors through its intrinsics, which differ in nothing but names.
#[cfg(target_arch = "x86_64")]
macro_rules! intrinsics {
    ($type:ident, $vector:ty, $width:literal, $splat:ident $load:ident $store:ident $add:ident $sub:ident $mul:ident
     $div:ident $mul_add:ident $max:ident $min:ident, |$of:ident, $a:ident, $b:ident| $blend:expr,
     |$shifted:ident| $power:expr, $sum:ident $greatest:ident $load_bf16:ident $store_bf16:ident) => {
        impl Lanes for $type {
            type V = $vector;
            const WIDTH: usize = $width;
            #[inline(always)]
            fn splat(self, x: f32) -> $vector {
                // SAFETY: here and below: a value of this type exists only where the processor has the instructions.
                unsafe { $splat(x) }
            }
            #[inline(always)]
            unsafe fn load(self, from: *const f32) -> $vector {
                // SAFETY: the caller's.
                unsafe { $load(from) }
            }
            #[inline(always)]
            unsafe fn store(self, to: *mut f32, v: $vector) {
                // SAFETY: the caller's.
                unsafe { $store(to, v) }
            }
            #[inline(always)]
            unsafe fn load_bf16(self, from: *const u16) -> $vector {
                // SAFETY: the caller's.
                unsafe { $load_bf16(from) }
            }
            #[inline(always)]
            unsafe fn store_bf16(self, to: *mut u16, v: $vector) {
                // SAFETY: the caller's.
                unsafe { $store_bf16(to, v) }
            }
            #[inline(always)]
            fn add(self, a: $vector, b: $vector) -> $vector {
                // SAFETY: as for `splat`.
                unsafe { $add(a, b) }
            }
            #[inline(always)]
            fn sub(self, a: $vector, b: $vector) -> $vector {
                // SAFETY: as for `splat`.
                unsafe { $sub(a, b) }
            }
            #[inline(always)]
            fn mul(self, a: $vector, b: $vector) -> $vector {
                // SAFETY: as for `splat`.
                unsafe { $mul(a, b) }
            }
            #[inline(always)]
            fn div(self, a: $vector, b: $vector) -> $vector {
                // SAFETY: as for `splat`.
                unsafe { $div(a, b) }
            }
            #[inline(always)]
            fn mul_add(self, a: $vector, b: $vector, c: $vector) -> $vector {
                // SAFETY: as for `splat`.
                unsafe { $mul_add(a, b, c) }
            }
            #[inline(always)]
            fn max(self, a: $vector, b: $vector) -> $vector {
                // SAFETY: as for `splat`.
                unsafe { $max(a, b) }
            }
            #[inline(always)]
            fn min(self, a: $vector, b: $vector) -> $vector {
                // SAFETY: as for `splat`.
                unsafe { $min(a, b) }
            }
            #[inline(always)]
            fn where_negative(self, $of: $vector, $a: $vector, $b: $vector) -> $vector {
                // SAFETY: as for `splat`.
                unsafe { $blend }
            }
            #[inline(always)]
            fn power_of_two(self, $shifted: $vector) -> $vector {
                // SAFETY: as for `splat`.
                unsafe { $power }
            }
            #[inline(always)]
            fn sum(self, v: $vector) -> f32 {
                // SAFETY: as for `splat`.
                unsafe { $sum(v) }
            }
            #[inline(always)]
            fn greatest(self, v: $vector) -> f32 {
                // SAFETY: as for `splat`.
                unsafe { $greatest(v) }
            }
            #[inline(always)]
            unsafe fn turn(self, from: *const f32, from_row: usize, to: *mut f32, to_row: usize) {
                // SAFETY: the caller's; both levels have AVX2.
                unsafe { turn_with_avx2(from, from_row, to, to_row) }
            }
        }
    };
}

/// The lanes of a vector taken together, halves first as in [`Lanes::sum`]: through memory it took as long as the
/// exponentials of a row of 64.
#[cfg(target_arch = "x86_64")]
macro_rules! together {
    ($of_8:ident, $of_16:ident, $of_8_each:ident, $of_4_each:ident, $of_1:ident) => {
        #[inline]
        #[target_feature(enable = "avx2")]
        fn $of_8(v: __m256) -> f32 {
            let fours = $of_4_each(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let twos = $of_4_each(fours, _mm_movehl_ps(fours, fours));
            _mm_cvtss_f32($of_1(twos, _mm_shuffle_ps::<1>(twos, twos)))
        }

        #[inline]
        #[target_feature(enable = "avx512f,avx2")]
        fn $of_16(v: __m512) -> f32 {
            let high = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(v)));
            $of_8($of_8_each(_mm512_castps512_ps256(v), high))
        }
    };
}
#[cfg(target_arch = "x86_64")]
together!(sum_of_8, sum_of_16, _mm256_add_ps, _mm_add_ps, _mm_add_ss);
#[cfg(target_arch = "x86_64")]
together!(greatest_of_8, greatest_of_16, _mm256_max_ps, _mm_max_ps, _mm_max_ss);

/// Pairs of rows are woven into each other by one, two and four floats: three times eight instructions.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn turn_with_avx2(from: *const f32, from_row: usize, to: *mut f32, to_row: usize) {
    // SAFETY: the caller's.
    let r: [__m256; 8] = std::array::from_fn(|j| unsafe { _mm256_loadu_ps(from.add(j * from_row)) });
    let mut ones = r;
    for j in (0..8).step_by(2) {
        ones[j] = _mm256_unpacklo_ps(r[j], r[j + 1]);
        ones[j + 1] = _mm256_unpackhi_ps(r[j], r[j + 1]);
    }
    let mut twos = ones;
    for (half, at) in [(0, 0), (4, 4)] {
        for (k, (a, b)) in [(ones[half], ones[half + 2]), (ones[half + 1], ones[half + 3])].into_iter().enumerate() {
            twos[at + 2 * k] = _mm256_shuffle_ps::<0x44>(a, b);
            twos[at + 2 * k + 1] = _mm256_shuffle_ps::<0xee>(a, b);
        }
    }
    for i in 0..4 {
        // SAFETY: the caller's.
        unsafe {
            let (low, high) = (twos[i], twos[i + 4]);
            _mm256_storeu_ps(to.add(i * to_row), _mm256_permute2f128_ps::<0x20>(low, high));
            _mm256_storeu_ps(to.add((i + 4) * to_row), _mm256_permute2f128_ps::<0x31>(low, high));
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load_8_bf16(from: *const u16) -> __m256 {
    // SAFETY: the caller's.
    let halves = unsafe { _mm_loadu_si128(from.cast()) };
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)))
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn store_8_bf16(to: *mut u16, v: __m256) {
    let bits = _mm256_castps_si256(v);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x40_0000));
    let is_nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
    let wide = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, is_nan));
    let narrow = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi32(wide, wide));
    // SAFETY: the caller's.
    unsafe { _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(narrow)) }
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f,avx2")]
unsafe fn load_16_bf16(from: *const u16) -> __m512 {
    // SAFETY: the caller's.
    let halves = unsafe { _mm256_loadu_si256(from.cast()) };
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f,avx2")]
unsafe fn store_16_bf16(to: *mut u16, v: __m512) {
    let bits = _mm512_castps_si512(v);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
    let wide = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x40_0000));
    // SAFETY: the caller's.
    unsafe { _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(wide))) }
}

/// Eight floats.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

#[cfg(target_arch = "x86_64")]
intrinsics!(Avx2, __m256, 8,
    _mm256_set1_ps _mm256_loadu_ps _mm256_storeu_ps _mm256_add_ps _mm256_sub_ps _mm256_mul_ps
    _mm256_div_ps _mm256_fmadd_ps _mm256_max_ps _mm256_min_ps,
    |of, a, b| _mm256_blendv_ps(b, a, of),
    |shifted| {
        let bits = _mm256_slli_epi32::<23>(_mm256_castps_si256(shifted));
        _mm256_castsi256_ps(_mm256_add_epi32(bits, _mm256_set1_epi32(0x3f80_0000)))
    },
    sum_of_8 greatest_of_8 load_8_bf16 store_8_bf16
);

/// Sixteen floats.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

#[cfg(target_arch = "x86_64")]
intrinsics!(Avx512, __m512, 16,
    _mm512_set1_ps _mm512_loadu_ps _mm512_storeu_ps _mm512_add_ps _mm512_sub_ps _mm512_mul_ps
    _mm512_div_ps _mm512_fmadd_ps _mm512_max_ps _mm512_min_ps,
    |of, a, b| _mm512_mask_blend_ps(_mm512_cmplt_epi32_mask(_mm512_castps_si512(of), _mm512_setzero_si512()), b, a),
    |shifted| {
        let bits = _mm512_slli_epi32::<23>(_mm512_castps_si512(shifted));
        _mm512_castsi512_ps(_mm512_add_epi32(bits, _mm512_set1_epi32(0x3f80_0000)))
    },
    sum_of_16 greatest_of_16 load_16_bf16 store_16_bf16
);
