//! Sorted words of many sources → the same words, each once, their counts added up.
//!
//! In: [`Sorted`] sources. Out: words in ascending order. Memory: what each source holds. Called by `runs` and `tally`.

use super::about::add;
use crate::error::Result;
use crate::progress::Progress;
use crate::sorted_words::SortedWords;

/// Words in ascending order.
pub(super) trait Sorted {
    /// Goes to the next word; `false` behind the last.
    fn advance(&mut self) -> Result<bool>;
    /// The word.
    fn word(&self) -> &[u8];
    /// How often it occurs.
    fn count(&self) -> u64;
}

impl Sorted for SortedWords {
    fn advance(&mut self) -> Result<bool> {
        Ok(self.next())
    }

    fn word(&self) -> &[u8] {
        self.word()
    }

    fn count(&self) -> u64 {
        self.count()
    }
}

/// Sources, the one with the smallest word on top of a binary heap.
struct Heap<'s>(Vec<Box<dyn Sorted + 's>>);

impl Heap<'_> {
    fn sink(&mut self, mut at: usize) {
        let heap = &mut self.0;
        loop {
            let (left, right) = (2 * at + 1, 2 * at + 2);
            let mut least = at;
            for child in [left, right] {
                if child < heap.len() && heap[child].word() < heap[least].word() {
                    least = child;
                }
            }
            if least == at {
                return;
            }
            heap.swap(at, least);
            at = least;
        }
    }

    /// The top source goes on.
    fn advance(&mut self) -> Result<()> {
        if !self.0[0].advance()? {
            self.0.swap_remove(0);
        }
        self.sink(0);
        Ok(())
    }
}

/// Words between two looks at whether to stop.
const LOOK_EVERY: u64 = 1 << 14;

/// Calls `f` with every word that occurs `least` times or more in all sources together.
pub(super) fn merge(
    sources: Vec<Box<dyn Sorted + '_>>,
    least: u64,
    progress: &Progress,
    mut f: impl FnMut(&[u8], u64) -> Result<()>,
) -> Result<()> {
    let mut heap = Heap(Vec::with_capacity(sources.len()));
    for mut source in sources {
        if source.advance()? {
            heap.0.push(source);
        }
    }
    for at in (0..heap.0.len() / 2).rev() {
        heap.sink(at);
    }
    let (mut word, mut n) = (Vec::new(), 0);
    while let Some(top) = heap.0.first() {
        word.clear();
        word.extend_from_slice(top.word());
        let mut count = top.count();
        heap.advance()?;
        while let Some(top) = heap.0.first()
            && top.word() == &*word
        {
            count = add(count, top.count())?;
            heap.advance()?;
        }
        if count >= least {
            f(&word, count)?;
        }
        n += 1;
        if n % LOOK_EVERY == 0 {
            progress.check()?;
        }
    }
    Ok(())
}
