//! Numbers as they lie in memory: float32, and bf16, with which everything is computed in float32 and rounded once.

use crate::simd::{Lanes, to_bf16};

/// A number that kernels read and write: `f32` or [`Bf16`].
pub trait Number: Copy + Default + Send + Sync + sealed::Number {
    /// The product, rounded to this type.
    #[must_use]
    fn times(self, factor: f32) -> Self;
}

mod sealed {
    pub trait Number {
        /// Whether it is a [`super::Bf16`]; else it is an `f32`.
        const IS_BF16: bool;
    }
    impl Number for f32 {
        const IS_BF16: bool = false;
    }
    impl Number for super::Bf16 {
        const IS_BF16: bool = true;
    }
}

/// # Safety
/// As many as a vector holds can be read.
#[inline(always)]
pub(crate) unsafe fn load<L: Lanes, N: Number>(lanes: L, from: *const N) -> L::V {
    // SAFETY: the caller's, and the type is what the constant says.
    unsafe { if N::IS_BF16 { lanes.load_bf16(from.cast()) } else { lanes.load(from.cast()) } }
}

/// # Safety
/// As many as a vector holds can be written.
#[inline(always)]
pub(crate) unsafe fn store<L: Lanes, N: Number>(lanes: L, to: *mut N, v: L::V) {
    // SAFETY: the caller's, and the type is what the constant says.
    unsafe { if N::IS_BF16 { lanes.store_bf16(to.cast(), v) } else { lanes.store(to.cast(), v) } }
}

impl Number for f32 {
    #[inline(always)]
    fn times(self, factor: f32) -> Self {
        self * factor
    }
}

/// The upper half of a float32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Bf16(pub u16);

impl Bf16 {
    /// The nearest one, ties to even; NaN stays NaN.
    #[must_use]
    pub fn of(x: f32) -> Self {
        Self(to_bf16(x))
    }

    /// As a float32.
    #[must_use]
    #[inline(always)]
    pub fn wide(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }
}

impl Number for Bf16 {
    #[inline(always)]
    fn times(self, factor: f32) -> Self {
        Self(to_bf16(self.wide() * factor))
    }
}
