//! Which documents a sample takes: a pure function of the seed, the file's place and the document's number.
//!
//! In: numbers. Out: yes or no. So neither threads nor chunks change a sample, and a smaller share of the same
//! seed is a part of a larger one. Called by the sources.

use twox_hash::XxHash3_64;

/// A share of all documents, chosen by a seed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    seed: u64,
    /// Hashes up to this are taken.
    highest: u64,
}

impl Sample {
    /// A share above 0 and at most 1.
    pub fn new(share: f64, seed: u64) -> Self {
        // 2^64 is more than a u64 holds: the conversion saturates, and a share of 1 takes everything.
        #[expect(clippy::cast_sign_loss, reason = "a share is positive")]
        let highest = (share * 18_446_744_073_709_551_616.0) as u64;
        Self { seed, highest }
    }

    /// Whether document `number` of file `file` is taken.
    pub fn takes(self, file: usize, number: u64) -> bool {
        let mut key = [0; 24];
        for (part, value) in key.chunks_exact_mut(8).zip([self.seed, file as u64, number]) {
            part.copy_from_slice(&value.to_le_bytes());
        }
        XxHash3_64::oneshot(&key) <= self.highest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_has_its_share_and_smaller_ones_lie_in_larger_ones() {
        let taken = |share, seed| (0..100_000).filter(|&n| Sample::new(share, seed).takes(3, n)).collect::<Vec<_>>();
        for share in [0.001_f64, 0.1, 0.5, 0.9] {
            // Five standard deviations of a binomial.
            let (mean, spread) = (100_000.0 * share, (100_000.0 * share * (1.0 - share)).sqrt());
            assert!((f64::from(taken(share, 7).len() as u32) - mean).abs() < 5.0 * spread, "{share}");
        }
        let (small, large) = (taken(0.1, 7), taken(0.3, 7));
        assert!(small.iter().all(|n| large.binary_search(n).is_ok()));
        assert_ne!(small, taken(0.1, 8));
        assert_eq!(taken(1.0, 7).len(), 100_000);
        let other_file: Vec<_> = (0..100_000).filter(|&n| Sample::new(0.1, 7).takes(4, n)).collect();
        assert_ne!(small, other_file);
    }
}
