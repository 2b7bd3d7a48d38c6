//! What merging will need, told from the counts before it begins.
//!
//! In: words by their frequency. Out: bytes, and the least `min_frequency` that fits a cap. Called by `tally`.

use super::limits::human;
use crate::error::{Error, Result};
use crate::words::Words;

/// Counts below have a class each; those above share one with others of the same number of bits.
const EXACT: usize = 4096;

/// How many words, and bytes of words, there are of each frequency.
#[derive(Debug, Clone)]
pub struct Frequencies(Vec<(u64, u64)>);

impl Default for Frequencies {
    fn default() -> Self {
        Self(vec![(0, 0); EXACT + 64])
    }
}

fn class(count: u64) -> usize {
    if count < EXACT as u64 { count as usize } else { EXACT + count.ilog2() as usize }
}

impl Frequencies {
    /// Takes in a word of `bytes` bytes that occurs `count` times.
    pub fn add(&mut self, bytes: usize, count: u64) {
        let (words, sum) = &mut self.0[class(count)];
        *words += 1;
        *sum += bytes as u64;
    }

    fn total(&self, least: usize) -> (u64, u64) {
        self.0[least..].iter().fold((0, 0), |sum, class| (sum.0 + class.0, sum.1 + class.1))
    }

    /// Refuses what `cap` bytes have no room for, and says what they have room for.
    pub fn check(&self, wanted: usize, cap: u64) -> Result<()> {
        let (words, bytes) = self.total(0);
        let need = merging(words, bytes, wanted);
        if need <= cap {
            return Ok(());
        }
        let fits = (2..EXACT).find_map(|least| {
            let (words, bytes) = self.total(least);
            let need = merging(words, bytes, wanted);
            (need <= cap && words > 0).then(|| format!("--min-frequency {least} (needs {}) or ", human(need)))
        });
        let (need, cap) = (human(need), human(cap));
        Err(Error::Config(format!(
            "training: merging {words} distinct words needs {need}, more than max_memory {cap}; expected {}--max-memory of {need} or more",
            fits.unwrap_or_default()
        )))
    }

    /// A place for each word, the most frequent ones first: what is read often in training lies together.
    pub(super) fn place(&self) -> Placer {
        let (mut words, mut bytes) = (0, 0);
        let mut next = vec![(0, 0); self.0.len()];
        for (&(n, size), next) in self.0.iter().zip(&mut next).rev() {
            *next = (words as usize, bytes as usize);
            words += n;
            bytes += size;
        }
        Placer { next, bytes: vec![0; bytes as usize], ends: vec![(0, 0); words as usize] }
    }
}

/// Puts words of any order where their frequency says, without sorting them.
pub(super) struct Placer {
    /// By class: the next word and where its bytes go.
    next: Vec<(usize, usize)>,
    bytes: Vec<u8>,
    ends: Vec<(u64, u64)>,
}

impl Placer {
    pub(super) fn push(&mut self, word: &[u8], count: u64) {
        let (n, at) = &mut self.next[class(count)];
        self.bytes[*at..*at + word.len()].copy_from_slice(word);
        *at += word.len();
        self.ends[*n] = (*at as u64, count);
        *n += 1;
    }

    pub(super) fn into_words(self) -> Words {
        Words::from_parts(self.bytes, self.ends)
    }
}

/// Bytes that training holds at most while it merges so many distinct words, of `bytes` bytes together.
///
/// The words and their counts; a cell for each byte and each border; [`PAIR`] for each two neighbours.
/// `tests/test_counts_memory.py` holds it to what a process really takes.
pub fn merging(words: u64, bytes: u64, wanted: usize) -> u64 {
    let cell = if 256 + wanted < usize::from(u16::MAX) { 2 } else { 4 };
    let pairs = bytes.saturating_sub(words);
    (4 << 20) + bytes + 16 * words + cell * (bytes + words) + 8 * words + PAIR * pairs
}

/// Bytes for each pair of neighbours in the distinct words: postings, eight bytes each, first and later ones, the
/// queue's entries and the lists of one merge. Measured: 27 on words that are alike, 28 on long ones.
const PAIR: u64 = 32;
