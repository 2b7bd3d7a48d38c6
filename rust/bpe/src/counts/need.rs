//! What merging will need, told from the counts before it begins.
//!
//! In: words by their frequency. Out: bytes, and the least `min_frequency` that fits a cap. Called by `tally`.

use super::limits::human;
use crate::error::{Error, Result};
use crate::words::{EXACT, Frequencies};

/// Refuses what `cap` bytes have no room for, and says what they have room for.
pub(super) fn check(frequencies: &Frequencies, wanted: usize, cap: u64) -> Result<()> {
    let (words, bytes) = frequencies.total(0);
    let need = merging(words, bytes, wanted);
    if need <= cap {
        return Ok(());
    }
    let fits = (2..EXACT).find_map(|least| {
        let (words, bytes) = frequencies.total(least);
        let need = merging(words, bytes, wanted);
        (need <= cap && words > 0).then(|| format!("--min-frequency {least} (needs {}) or ", human(need)))
    });
    let (need, cap) = (human(need), human(cap));
    Err(Error::Config(format!(
        "training: merging {words} distinct words needs {need}, more than max_memory {cap}; expected {}--max-memory of {need} or more",
        fits.unwrap_or_default()
    )))
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
