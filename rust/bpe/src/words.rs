//! Distinct pre-tokens with their counts, flat: two allocations instead of one a word.
//!
//! Made by `count` or by hand, read by `train`.

/// Distinct words, each with the number of its occurrences.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Words {
    bytes: Vec<u8>,
    /// (end in `bytes`, count) of each word.
    ends: Vec<(u64, u64)>,
}

impl Words {
    /// No words, with room for so many and their bytes.
    pub fn with_capacity(words: usize, bytes: usize) -> Self {
        Self { bytes: Vec::with_capacity(bytes), ends: Vec::with_capacity(words) }
    }

    /// Words that lie one behind the other in `bytes`, each with where it ends and its count.
    pub(crate) fn from_parts(bytes: Vec<u8>, ends: Vec<(u64, u64)>) -> Self {
        Self { bytes, ends }
    }

    /// Adds a word that is not in yet.
    pub fn push(&mut self, word: &[u8], count: u64) {
        self.bytes.extend_from_slice(word);
        self.ends.push((self.bytes.len() as u64, count));
    }

    /// Number of words.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Bytes of all words together.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Those that occur at least so often.
    #[must_use]
    pub fn at_least(&self, count: u64) -> Self {
        self.iter().filter(|word| word.1 >= count).collect()
    }

    /// The words, in the order in which they were added.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&[u8], u64)> {
        let mut start = 0;
        self.ends.iter().map(move |&(end, count)| {
            let word = &self.bytes[start..end as usize];
            start = end as usize;
            (word, count)
        })
    }
}

impl<W: AsRef<[u8]>> FromIterator<(W, u64)> for Words {
    fn from_iter<I: IntoIterator<Item = (W, u64)>>(words: I) -> Self {
        let mut all = Self::default();
        for (word, count) in words {
            all.push(word.as_ref(), count);
        }
        all
    }
}
