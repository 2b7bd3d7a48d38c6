//! Which documents go into which part: a pure function of the seed, the file's place among the inputs and the document's
//! number in it.
//!
//! In: numbers. Out: a place among the outputs. So neither threads nor chunks change a part, and no document is in two.
//! Called by `corpus`.

use twox_hash::XxHash3_64;

use crate::error::{Error, Result};

/// Parts with names and shares of all documents; what none of them takes goes into the output itself.
#[derive(Debug)]
pub(super) struct Shares {
    seed: u64,
    /// Hashes below these go to the parts, in their order.
    bounds: Vec<u64>,
}

impl Shares {
    pub fn new(split: &[(String, f64)], seed: u64) -> Result<Self> {
        let wrong = |what: String| Err(Error::Config(format!("split: {what}")));
        let (mut sum, mut bounds) = (0.0, Vec::new());
        for (n, (name, share)) in split.iter().enumerate() {
            let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
            if name.is_empty() || !name.chars().all(plain) || name.chars().all(|c| c.is_ascii_digit()) {
                return wrong(format!("found the name {name:?}; expected letters, digits, - and _, such as val"));
            }
            if split[..n].iter().any(|(other, _)| other == name) {
                return wrong(format!("found {name} twice; expected different names"));
            }
            sum += share;
            if !(*share > 0.0 && sum < 1.0) {
                return wrong(format!("found {name}={share}; expected shares above 0, below 1 in all"));
            }
            #[expect(clippy::cast_sign_loss, reason = "a share is positive")]
            bounds.push((sum * 18_446_744_073_709_551_616.0) as u64);
        }
        Ok(Self { seed, bounds })
    }

    pub fn is_split(&self) -> bool {
        !self.bounds.is_empty()
    }

    /// The output of document `number` of file `file`: 0, or one more than the part's place.
    pub fn output(&self, file: usize, number: u64) -> usize {
        // A word of its own: `--sample` with the same seed must not choose the same documents.
        let mut key = [0; 32];
        let parts = [u64::from_le_bytes(*b"a part: "), self.seed, file as u64, number];
        for (part, value) in key.chunks_exact_mut(8).zip(parts) {
            part.copy_from_slice(&value.to_le_bytes());
        }
        let hash = XxHash3_64::oneshot(&key);
        let place = self.bounds.partition_point(|&bound| bound <= hash);
        if place < self.bounds.len() { place + 1 } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sources::sample::Sample;

    #[test]
    fn parts_have_their_shares_whatever_a_sample_of_the_same_seed_takes() {
        let shares = Shares::new(&[("val".into(), 0.1), ("test".into(), 0.05)], 7).unwrap();
        let sample = Sample::new(0.1, 7);
        for taken_by_sample in [false, true] {
            let documents = (0..200_000).filter(|&n| !taken_by_sample || sample.takes(1, n));
            let mut found = [0.0; 3];
            for n in documents {
                found[shares.output(1, n)] += 1.0;
            }
            let all: f64 = found.iter().sum();
            for (share, count) in [0.85, 0.1, 0.05].iter().zip(found) {
                // Five standard deviations of a binomial.
                assert!((count - share * all).abs() < 5.0 * (all * share * (1.0 - share)).sqrt(), "{share}: {count}");
            }
        }
        let shares =
            |split: &[(&str, f64)]| Shares::new(&split.iter().map(|&(n, s)| (n.into(), s)).collect::<Vec<_>>(), 0);
        for (split, word) in [
            (vec![("val", 0.0)], "above 0"),
            (vec![("val", f64::NAN)], "above 0"),
            (vec![("val", 0.5), ("test", 0.5)], "below 1 in all"),
            (vec![("val", 0.1), ("val", 0.1)], "twice"),
            (vec![("../val", 0.1)], "letters"),
            (vec![("00000", 0.1)], "letters"),
        ] {
            let said = shares(&split).unwrap_err().to_string();
            assert!(said.starts_with("split: ") && said.contains(word), "{said}");
        }
    }
}
