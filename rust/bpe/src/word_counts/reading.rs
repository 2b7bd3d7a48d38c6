//! What is in a table of words, in the order that its reader wants.
//!
//! In: a [`WordCounts`]. Out: its words sorted (`sorted_words`), in no order, or as training lays them out (`words`). Called
//! by `counts`.

use super::{TOUCHED_AT_ONCE, WordCounts};
use crate::error::Result;
use crate::packed::packed_len;
use crate::progress::Progress;
use crate::sorted_words::SortedWords;
use crate::words::{Frequencies, Words};

impl WordCounts {
    /// The words in the order of their bytes, in the memory of the table.
    ///
    /// # Errors
    /// [`Error::Interrupted`] when `progress` says so, looked at every few milliseconds.
    pub(crate) fn into_sorted_words(self, progress: &Progress) -> Result<SortedWords> {
        let (mut short, mut words) = (self.slots, 0);
        for at in 0..short.len() {
            if at % TOUCHED_AT_ONCE == 0 {
                progress.check()?;
            }
            short.swap(words, at);
            words += usize::from(short[words].0 != 0);
        }
        short.truncate(words);
        SortedWords::of(short, self.long.into_iter().collect(), progress)
    }

    /// The same beside the table.
    pub(crate) fn sorted_words(&self, progress: &Progress) -> Result<SortedWords> {
        let mut short = Vec::with_capacity(self.used);
        for slots in self.slots.chunks(TOUCHED_AT_ONCE) {
            progress.check()?;
            short.extend(slots.iter().filter(|slot| slot.0 != 0));
        }
        SortedWords::of(short, self.long.iter().map(|(word, &count)| (word.clone(), count)).collect(), progress)
    }

    /// Calls `f` with every word and its count, in no particular order.
    ///
    /// # Errors
    /// [`Error::Interrupted`].
    pub(crate) fn for_each(&self, progress: &Progress, mut f: impl FnMut(&[u8], u64)) -> Result<()> {
        for slots in self.slots.chunks(TOUCHED_AT_ONCE) {
            progress.check()?;
            for (key, count) in slots.iter().filter(|slot| slot.0 != 0) {
                f(&key.to_le_bytes()[..packed_len(*key)], *count);
            }
        }
        #[expect(clippy::iter_over_hash_type, reason = "no order is promised")]
        for (word, &count) in &self.long {
            f(word, count);
        }
        Ok(())
    }

    /// Every word with its count, the most frequent first: in training, what is read often lies together. Words that
    /// occur less than `least` times are left out; `fits` sees what the others take before they are copied.
    ///
    /// # Errors
    /// What `fits` says; [`Error::Interrupted`].
    pub(crate) fn frequent_words(
        &self,
        least: u64,
        progress: &Progress,
        fits: impl FnOnce(&Frequencies) -> Result<()>,
    ) -> Result<Words> {
        let mut frequencies = Frequencies::default();
        self.for_each(progress, |word, count| {
            if count >= least {
                frequencies.add(word.len(), count);
            }
        })?;
        fits(&frequencies)?;
        let mut placer = frequencies.place();
        self.for_each(progress, |word, count| {
            if count >= least {
                placer.push(word, count);
            }
        })?;
        Ok(placer.into_words())
    }

    /// Every word with its count, the most frequent first, equals in the order of their bytes: no trace of a
    /// hash table's order is left.
    pub fn into_sorted(self) -> Vec<(Vec<u8>, u64)> {
        let mut words = Vec::with_capacity(self.len());
        // Nobody can ask it to stop.
        let _ = self.for_each(&Progress::default(), |word, count| words.push((word.to_vec(), count)));
        words.sort_unstable_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        words
    }
}
