//! Distinct pre-tokens with their counts, flat: two allocations instead of one a word.
//!
//! Made by `count` or by hand, read by `train`.

use std::ops::Range;

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
        self.part(0..self.len())
    }

    /// Those of a range of numbers.
    pub(crate) fn part(&self, words: Range<usize>) -> impl ExactSizeIterator<Item = (&[u8], u64)> {
        let mut start = self.start_of(words.start);
        self.ends[words].iter().map(move |&(end, count)| {
            let word = &self.bytes[start..end as usize];
            start = end as usize;
            (word, count)
        })
    }

    /// Bytes before a word.
    pub(crate) fn start_of(&self, word: usize) -> usize {
        if word == 0 { 0 } else { self.ends[word - 1].0 as usize }
    }

    /// All words in so many ranges, of about as many bytes each as words allow.
    pub(crate) fn split(&self, parts: usize) -> Vec<Range<usize>> {
        let end = |part| {
            let bytes = (self.bytes() as u128 * part as u128 / parts as u128) as u64;
            // Words without a byte, at the front too, belong to some part.
            if part == 0 {
                return 0;
            }
            if part == parts { self.len() } else { self.ends.partition_point(|&(end, _)| end <= bytes) }
        };
        (0..parts).map(|part| end(part)..end(part + 1)).collect()
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

/// Counts below have a class each; those above share one with others of the same number of bits.
pub(crate) const EXACT: usize = 4096;

/// How many words, and bytes of words, there are of each frequency: with it words are put in order without sorting.
#[derive(Debug)]
pub(crate) struct Frequencies(Vec<(u64, u64)>);

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
    pub(crate) fn add(&mut self, bytes: usize, count: u64) {
        let (words, sum) = &mut self.0[class(count)];
        *words += 1;
        *sum += bytes as u64;
    }

    /// Words, and their bytes, of the classes from `least` on.
    pub(crate) fn total(&self, least: usize) -> (u64, u64) {
        self.0[least..].iter().fold((0, 0), |sum, class| (sum.0 + class.0, sum.1 + class.1))
    }

    /// A place for each word, the most frequent ones first: what is read often in training lies together.
    pub(crate) fn place(&self) -> Placer {
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
pub(crate) struct Placer {
    /// By class: the next word and where its bytes go.
    next: Vec<(usize, usize)>,
    bytes: Vec<u8>,
    ends: Vec<(u64, u64)>,
}

impl Placer {
    pub(crate) fn push(&mut self, word: &[u8], count: u64) {
        let (n, at) = &mut self.next[class(count)];
        self.bytes[*at..*at + word.len()].copy_from_slice(word);
        *at += word.len();
        self.ends[*n] = (*at as u64, count);
        *n += 1;
    }

    pub(crate) fn into_words(self) -> Words {
        Words::from_parts(self.bytes, self.ends)
    }
}
