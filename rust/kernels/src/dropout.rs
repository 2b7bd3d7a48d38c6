//! Dropout (Srivastava et al. 2014) without a mask in memory: whether a number stays is a function of a seed and of its
//! place, so that the backward makes the same choice again.
//!
//! The choice is a hash: each half of the seed goes into a round of two multiplications (Wellons 2018, "hash prospector",
//! the constants with the least bias found). A generator that goes from number to number, as torch's does, takes twenty
//! times as long and has one thread.

use crate::number::Number;
use crate::simd::{self, Job, Lanes, Level};
use crate::threads::{self, Pieces};

/// Numbers of one job.
const PIECE: usize = 16_384;

/// Numbers are dropped where their hash is below this.
#[expect(clippy::cast_sign_loss, reason = "a rate is none below 0")]
fn threshold(rate: f64) -> u32 {
    (rate * 4_294_967_296.0).round() as u32
}

/// The hash of a place.
#[inline(always)]
fn hash(seed: (u32, u32), place: u32) -> u32 {
    let round = |mut x: u32| {
        x = (x ^ x >> 16).wrapping_mul(0x21f0_aaad);
        x = (x ^ x >> 15).wrapping_mul(0xd35a_2d97);
        x ^ x >> 15
    };
    round(round(place ^ seed.0) ^ seed.1)
}

/// Whether the number at a place stays: the specification, a number at a time.
pub fn stays(seed: u64, rate: f64, place: u64) -> bool {
    hash(halves(seed, place), place as u32) >= threshold(rate)
}

/// Of the seed, the second with what of the place goes beyond 32 bits.
fn halves(seed: u64, place: u64) -> (u32, u32) {
    (seed as u32, (seed >> 32) as u32 ^ ((place >> 32) as u32).wrapping_mul(0x9e37_79b9))
}

/// y = x / (1 - rate) where it [`stays`], else 0.
///
/// # Panics
/// Lengths differ, or the rate is not in [0, 1).
pub fn dropout<N: Number>(level: Level, threads: usize, seed: u64, rate: f64, x: &[N], y: &mut [N]) {
    behind(0, level, threads, (seed, rate), x, y);
}

/// The same of numbers behind so many others, a multiple of [`PIECE`].
fn behind<N: Number>(others: u64, level: Level, threads: usize, (seed, rate): (u64, f64), x: &[N], y: &mut [N]) {
    assert!((0.0..1.0).contains(&rate), "dropout: found rate {rate}");
    assert_eq!(x.len(), y.len());
    let y = Pieces::new(y, PIECE);
    threads::share(threads, x.len().div_ceil(PIECE), |index| {
        let from = index * PIECE;
        let x = &x[from..x.len().min(from + PIECE)];
        // SAFETY: every index comes once.
        let y = unsafe { y.piece(index) };
        // A piece ends where 32 bits do, or earlier.
        let from = others + from as u64;
        let (seed, first) = (halves(seed, from), from as u32);
        simd::run(level, Dropped { seed, first, least: threshold(rate), scale: (1.0 / (1.0 - rate)) as f32, x, y });
    });
}

struct Dropped<'a, N> {
    seed: (u32, u32),
    first: u32,
    least: u32,
    scale: f32,
    x: &'a [N],
    y: &'a mut [N],
}

impl<N: Number> Job for Dropped<'_, N> {
    type Out = ();
    /// Whole numbers have no [`Lanes`]: the compiler makes vectors of the level's of this loop.
    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        let Self { seed, first, least, scale, x, y } = self;
        // Counted by hand: a count that is checked for overflow keeps the loop from becoming vectors.
        let mut place = first;
        for (y, x) in y.iter_mut().zip(x) {
            let kept = x.times(scale);
            *y = if hash(seed, place) >= least { kept } else { N::default() };
            place = place.wrapping_add(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cmp::Ordering;
    use std::fmt::Debug;

    use super::*;
    use crate::number::Bf16;
    use proptest::prelude::*;

    fn levels() -> impl Iterator<Item = Level> {
        Level::ALL.into_iter().filter(|level| level.is_here())
    }

    proptest! {
        #[test]
        fn every_level_and_number_of_threads_does_what_is_specified(
            seed in any::<u64>(),
            rate in 0.0..0.999f64,
            len in 0usize..40_000,
            threads in 1usize..4,
            pieces in prop::sample::select(vec![0, 1, (1 << 18) - 1, 1 << 18, 5 << 18]),
        ) {
            let x: Vec<f32> = (0..len as u16).map(|n| f32::from(n) - 100.0).collect();
            let others = pieces * PIECE as u64;
            holds(others, threads, (seed, rate), &x)?;
            holds(others, threads, (seed, rate), &x.into_iter().map(Bf16::of).collect::<Vec<_>>())?;
        }

        #[test]
        fn bf16_is_rounded_to_the_nearest_and_ties_to_even(bits in any::<u32>(), tie in any::<bool>()) {
            let x = f32::from_bits(if tie { bits & !0x7fff | 0x8000 } else { bits });
            let found = Bf16::of(x);
            prop_assume!(x.is_finite());
            let [below, above] = [bits >> 16, (bits >> 16) + 1].map(|half| Bf16(half as u16));
            let off = |half: Bf16| (f64::from(half.wide()) - f64::from(x)).abs();
            prop_assume!(above.wide().is_finite());
            let nearest = match off(below).total_cmp(&off(above)) {
                Ordering::Less => below,
                Ordering::Greater => above,
                Ordering::Equal => if below.0 & 1 == 0 { below } else { above },
            };
            prop_assert_eq!(found, nearest, "{}", x);
        }
    }

    fn holds<N: Number + PartialEq + Debug>(
        others: u64,
        threads: usize,
        (seed, rate): (u64, f64),
        x: &[N],
    ) -> Result<(), TestCaseError> {
        let scale = (1.0 / (1.0 - rate)) as f32;
        let kept = |(place, x): (u64, &N)| if stays(seed, rate, place) { x.times(scale) } else { N::default() };
        let expected: Vec<N> = (others..).zip(x).map(kept).collect();
        for level in levels() {
            let mut y = x.to_vec();
            behind(others, level, threads, (seed, rate), x, &mut y);
            prop_assert_eq!(&y, &expected, "{}", level.name());
        }
        Ok(())
    }

    /// Shares of two hundred thousand within five deviations, of single numbers and of pairs of neighbours, rows and seeds.
    #[test]
    fn choices_are_as_if_independent() {
        let (rate, n) = (0.2, 200_000u32);
        for seed in [0, 1, 1 << 32, u64::MAX, 0x0123_4567_89ab_cdef] {
            let share = |both: &dyn Fn(u64) -> bool| {
                f64::from((0..n).map(|place| u32::from(both(place.into()))).sum::<u32>()) / f64::from(n)
            };
            let near = |found: f64, expected: f64| (found - expected).abs() < 5.0 * (expected / f64::from(n)).sqrt();
            let drops = |seed: u64, place: u64| !stays(seed, rate, place);
            assert!(near(share(&|place| drops(seed, place)), rate));
            for step in [1, 2, 64, 256, 4096, 1 << 16, 1 << 32] {
                assert!(near(share(&|place| drops(seed, place) && drops(seed, place + step)), rate * rate), "{step}");
            }
            for other in [seed ^ 1, seed ^ 1 << 31, seed ^ 1 << 32, seed.wrapping_add(1 << 40), !seed] {
                assert!(near(share(&|place| drops(seed, place) && drops(other, place)), rate * rate), "{other}");
            }
        }
    }
}
