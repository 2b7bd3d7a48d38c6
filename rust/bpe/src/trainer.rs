//! Text → vocabulary, the whole way: checks, counting, merging.
//!
//! In: files, or documents one after another. Out: a [`Vocab`] and the [`TrainStats`] of the run. Called by the
//! binding; joins `count`, `train` and `vocab`.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::counts::{Counts, Memory};
use crate::error::Result;
use crate::input::Inputs;
use crate::pretokenize::{Pattern, Splitter, TextPolicy};
use crate::progress::Progress;
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
    /// Tables of counts that had no room in memory and went to disk.
    pub spilled_runs: u64,
    /// Bytes of the longest token.
    #[serde(skip)]
    pub longest_token: Vec<u8>,
}

/// A training run: checked settings and the counts so far.
#[derive(Debug)]
pub struct Trainer {
    rule: TieBreak,
    requested_merges: usize,
    min_frequency: u64,
    counts: Counts,
    count_time: Duration,
    threads: usize,
}

impl Trainer {
    /// Checks the settings before any text is read.
    pub fn new(
        vocab_size: usize,
        specials: &[String],
        pattern: &str,
        rule: TieBreak,
        policy: TextPolicy,
    ) -> Result<Self> {
        let requested_merges = room_for_merges(vocab_size, specials)?;
        let splitter = Splitter::new(Arc::new(Pattern::new(pattern)?), specials)?;
        let counts = Counts::new(splitter, policy, Memory::new(None, None)?);
        Ok(Self { rule, requested_merges, min_frequency: 1, counts, count_time: Duration::ZERO, threads: 1 })
    }

    /// A run on counts that are there.
    pub fn from_counts(counts: Counts, vocab_size: usize, rule: TieBreak) -> Result<Self> {
        let requested_merges = room_for_merges(vocab_size, counts.splitter().specials())?;
        Ok(Self { rule, requested_merges, min_frequency: 1, counts, count_time: Duration::ZERO, threads: 1 })
    }

    /// Leaves rarer words out.
    pub fn set_min_frequency(&mut self, min_frequency: u64) {
        self.min_frequency = min_frequency;
    }

    /// Caps the memory of counting and merging.
    pub fn set_memory(&mut self, memory: Memory) {
        self.counts.set_memory(memory);
    }

    /// Counts the text of files; no pre-token crosses from one to the next.
    pub fn add_files(
        &mut self,
        paths: &[PathBuf],
        threads: usize,
        chunk_bytes: usize,
        progress: &Progress,
    ) -> Result<()> {
        let start = Instant::now();
        let inputs = Inputs::open(paths)?;
        self.counts.add_files(&inputs, threads, chunk_bytes, progress)?;
        self.threads = threads;
        self.count_time += start.elapsed();
        Ok(())
    }

    /// Counts one document.
    pub fn add_document(&mut self, text: &[u8]) -> Result<()> {
        let start = Instant::now();
        self.counts.add_text(text)?;
        self.count_time += start.elapsed();
        Ok(())
    }

    /// Learns the merges.
    pub fn finish(mut self, progress: &Progress) -> Result<(Vocab, TrainStats)> {
        let start = Instant::now();
        let about = self.counts.about()?;
        let words = self.counts.words(self.min_frequency, self.requested_merges, progress)?;
        let (splitter, spilled_runs) = (Arc::clone(self.counts.splitter()), self.counts.spilled_runs());
        // The tables have done their work.
        drop(self.counts);
        let merges = train(&words, self.requested_merges, self.rule, progress)?;
        let stats = TrainStats {
            bytes: about.bytes,
            pretokens: about.pretokens,
            distinct_pretokens: words.len(),
            merges: merges.pairs.len(),
            requested_merges: self.requested_merges,
            count_s: self.count_time.as_secs_f64(),
            merge_s: start.elapsed().as_secs_f64(),
            threads: self.threads,
            spilled_runs,
            longest_token: merges.tokens.iter().max_by_key(|token| token.len()).cloned().unwrap_or_default(),
        };
        let vocab = Vocab::from_training(merges, splitter.specials(), splitter.pattern().name())?;
        Ok((vocab, stats))
    }
}
