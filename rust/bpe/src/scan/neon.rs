//! [`Lanes`] of NEON, which every `AArch64` processor has.

use std::arch::aarch64::{
    uint8x16_t, vandq_u8, vceqq_u8, vcgeq_u8, vcleq_u8, vdupq_n_u8, vgetq_lane_u64, vld1q_u8, vorrq_u8, vpaddq_u8,
    vreinterpretq_u64_u8,
};

use super::lanes::{BLOCK, Lanes};

/// Sixteen bytes at a time.
#[derive(Clone, Copy)]
pub(super) struct Neon;

impl Neon {
    /// A bit a byte, from four vectors whose bytes are all ones or zeros: each keeps the bit of its place, and adding
    /// neighbours three times brings eight bits into one byte.
    #[inline(always)]
    fn gather(block: &[u8; BLOCK], f: impl Fn(uint8x16_t) -> uint8x16_t) -> u64 {
        const BITS: [u8; 16] = [1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128];
        // SAFETY: NEON is a part of every AArch64 target; 64 bytes are there, and 16 bits. So below.
        unsafe {
            let bits = vld1q_u8(BITS.as_ptr());
            let part = |at| vandq_u8(f(vld1q_u8(block.as_ptr().add(at))), bits);
            let (low, high) = (vpaddq_u8(part(0), part(16)), vpaddq_u8(part(32), part(48)));
            let sums = vpaddq_u8(low, high);
            vgetq_lane_u64::<0>(vreinterpretq_u64_u8(vpaddq_u8(sums, sums)))
        }
    }

    #[inline(always)]
    fn all(byte: u8) -> uint8x16_t {
        // SAFETY: as above.
        unsafe { vdupq_n_u8(byte) }
    }

    #[inline(always)]
    fn lower(x: uint8x16_t) -> uint8x16_t {
        // SAFETY: as above.
        unsafe { vorrq_u8(x, Self::all(0x20)) }
    }

    #[inline(always)]
    fn are_within(x: uint8x16_t, from: u8, to: u8) -> uint8x16_t {
        // SAFETY: as above.
        unsafe { vandq_u8(vcgeq_u8(x, Self::all(from)), vcleq_u8(x, Self::all(to))) }
    }
}

impl Lanes for Neon {
    #[inline(always)]
    fn within(self, block: &[u8; BLOCK], from: u8, to: u8) -> u64 {
        Self::gather(block, |x| Self::are_within(x, from, to))
    }

    #[inline(always)]
    fn letters(self, block: &[u8; BLOCK]) -> u64 {
        Self::gather(block, |x| Self::are_within(Self::lower(x), b'a', b'z'))
    }

    #[inline(always)]
    fn equal(self, block: &[u8; BLOCK], byte: u8) -> u64 {
        // SAFETY: as above.
        Self::gather(block, |x| unsafe { vceqq_u8(x, Self::all(byte)) })
    }

    #[inline(always)]
    fn equal_lower(self, block: &[u8; BLOCK], byte: u8) -> u64 {
        // SAFETY: as above.
        Self::gather(block, |x| unsafe { vceqq_u8(Self::lower(x), Self::all(byte)) })
    }

    #[inline(always)]
    fn high(self, block: &[u8; BLOCK]) -> u64 {
        Self::within(self, block, 0x80, 0xff)
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn vectors_compare_as_one_by_one() {
        super::super::lanes::tests::hold(super::Neon);
    }
}
