//! Text → vocabulary, the whole way: checks, counting, merging.
//!
//! In: files, or documents one after another. Out: a [`Vocab`] and the [`TrainStats`] of the run. Called by the
//! binding; joins `count`, `train` and `vocab`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::count::{WordCounts, count_files, count_text};
use crate::error::Result;
use crate::input::Inputs;
use crate::pretokenize::{Pattern, Splitter, TextPolicy};
use crate::progress::Progress;
use crate::sources::InputSpec;
use crate::train::{TieBreak, train};
use crate::vocab::{Vocab, room_for_merges};

/// What happened in a training run.
#[derive(Debug, Clone, Serialize)]
pub struct TrainStats {
    /// Bytes of text read.
    pub bytes: u64,
    /// Pre-tokens counted.
    pub pretokens: u64,
    /// Distinct ones among them.
    pub distinct_pretokens: usize,
    /// Merges learnt.
    pub merges: usize,
    /// Merges that the vocabulary has room for; more than `merges` where no pair was left.
    pub requested_merges: usize,
    /// Seconds of reading and counting.
    pub count_s: f64,
    /// Seconds of merging.
    pub merge_s: f64,
    /// Threads that counted.
    pub threads: usize,
    /// Bytes of the longest token.
    #[serde(skip)]
    pub longest_token: Vec<u8>,
}

/// A training run: checked settings and the counts so far.
#[derive(Debug)]
pub struct Trainer {
    specials: Vec<String>,
    splitter: Splitter,
    rule: TieBreak,
    policy: TextPolicy,
    requested_merges: usize,
    counts: WordCounts,
    bytes: u64,
    count_time: Duration,
    threads: usize,
}

impl Trainer {
    /// Checks the settings before any text is read.
    pub fn new(
        vocab_size: usize,
        specials: Vec<String>,
        pattern: &str,
        rule: TieBreak,
        policy: TextPolicy,
    ) -> Result<Self> {
        Ok(Self {
            requested_merges: room_for_merges(vocab_size, &specials)?,
            splitter: Splitter::new(Arc::new(Pattern::new(pattern)?), &specials)?,
            specials,
            rule,
            policy,
            counts: WordCounts::default(),
            bytes: 0,
            count_time: Duration::ZERO,
            threads: 1,
        })
    }

    /// Counts the text of inputs; no pre-token crosses from one document to the next.
    pub fn add_files(
        &mut self,
        inputs: InputSpec,
        threads: usize,
        chunk_bytes: usize,
        progress: &Progress,
    ) -> Result<()> {
        let start = Instant::now();
        let inputs = Inputs::of(inputs)?;
        let counts = count_files(&inputs, &self.splitter, self.policy, threads, chunk_bytes, progress)?;
        self.counts.merge(counts);
        self.threads = threads;
        self.bytes += inputs.text_bytes();
        self.count_time += start.elapsed();
        Ok(())
    }

    /// Counts one document.
    pub fn add_document(&mut self, text: &[u8]) -> Result<()> {
        let start = Instant::now();
        count_text(text, &self.splitter, self.policy, &mut self.counts)?;
        self.bytes += text.len() as u64;
        self.count_time += start.elapsed();
        Ok(())
    }

    /// Learns the merges.
    pub fn finish(self, progress: &Progress) -> Result<(Vocab, TrainStats)> {
        let start = Instant::now();
        let words = self.counts.into_words();
        let (pretokens, distinct_pretokens) = (words.iter().map(|word| word.1).sum(), words.len());
        let merges = train(&words, self.requested_merges, self.rule, progress)?;
        let stats = TrainStats {
            bytes: self.bytes,
            pretokens,
            distinct_pretokens,
            merges: merges.pairs.len(),
            requested_merges: self.requested_merges,
            count_s: self.count_time.as_secs_f64(),
            merge_s: start.elapsed().as_secs_f64(),
            threads: self.threads,
            longest_token: merges.tokens.iter().max_by_key(|token| token.len()).cloned().unwrap_or_default(),
        };
        let vocab = Vocab::from_training(merges, &self.specials, self.splitter.pattern().name())?;
        Ok((vocab, stats))
    }
}
