//! Text → vocabularies, the whole way: checks, counting, merging.
//!
//! In: files, or documents one after another. Out: a [`Vocab`] for each size asked for and the [`TrainStats`] of the
//! run. Called by the binding; joins `count`, `train` and `vocab`.

use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::checkpoint::{Checkpoint, Done, input};
use crate::counts::{Counts, Memory};
use crate::error::{Error, Result};
use crate::extend::{extended, prior_of};
use crate::input::Inputs;
use crate::pretokenize::{Pattern, Splitter, TextPolicy, UNICODE_VERSION, canonical_name};
use crate::prior::Prior;
use crate::progress::{Progress, Stage};
use crate::sources::InputSpec;
use crate::train::{Keep, Merges, Options, Pair, TieBreak, train_and_keep};
use crate::vocab::{Vocab, room_for_merges};

/// Merges that the statistics show.
const TOP: usize = 10;

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Tokens in all of each vocabulary, distinct: 256 bytes, merges and special tokens.
    pub vocab_sizes: Vec<usize>,
    /// Special tokens; none unless said, and those of `extend`.
    pub specials: Option<Vec<String>>,
    /// The pattern; GPT-2's unless said, and that of `extend`.
    pub pattern: Option<String>,
    /// Which of equally frequent pairs merges first.
    pub rule: TieBreak,
    /// What to do with invalid UTF-8.
    pub policy: TextPolicy,
    /// Rarer words and pairs do not count; 1 is all.
    pub min_frequency: u64,
    /// Most bytes of a token.
    pub max_token_length: usize,
    /// A tokenizer whose merges come first.
    pub extend: Option<Vocab>,
    /// The cap on memory; by default half of the machine's.
    pub memory: Option<Memory>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            vocab_sizes: Vec::new(),
            specials: None,
            pattern: None,
            rule: TieBreak::default(),
            policy: TextPolicy::Error,
            min_frequency: 1,
            max_token_length: usize::MAX,
            extend: None,
            memory: None,
        }
    }
}

/// What happened in a training run. Where several sizes were asked for, it is that of the largest.
#[derive(Debug, Clone, Serialize)]
pub struct TrainStats {
    /// Bytes of text read.
    pub bytes: u64,
    /// Pre-tokens counted.
    pub pretokens: u64,
    /// Distinct ones among them.
    pub distinct_pretokens: usize,
    /// Distinct ones that were frequent enough to be merged.
    pub kept_pretokens: usize,
    /// Merges learnt, without those of the tokenizer that was extended.
    pub merges: usize,
    /// Merges that the largest vocabulary has room for; more than `merges` where no pair was left.
    pub requested_merges: usize,
    /// Merges of the tokenizer that was extended.
    pub prior_merges: usize,
    /// Merges at which another pair was as frequent, so that the tie rule decided.
    pub ties: u64,
    /// Bytes of text that an earlier process had counted, as a checkpoint says.
    pub resumed_bytes: u64,
    /// Merges that an earlier process had done.
    pub resumed_merges: usize,
    /// Seconds of reading and counting.
    pub count_s: f64,
    /// Seconds of ordering the words and laying them out.
    pub layout_s: f64,
    /// Seconds of merging.
    pub merge_s: f64,
    /// Threads that counted and laid the words out.
    pub threads: usize,
    /// Tables of counts that had no room in memory and went to disk.
    pub spilled_runs: u64,
    /// Bytes of the longest token.
    #[serde(skip)]
    pub longest_token: Vec<u8>,
    /// The first merges learnt: both tokens, and how often they were neighbours.
    #[serde(skip)]
    pub top_merges: Vec<(Vec<u8>, Vec<u8>, u64)>,
}

/// A training run: checked settings and the counts so far.
#[derive(Debug)]
pub struct Trainer {
    settings: Settings,
    specials: Vec<String>,
    /// Merges in all for each size, prior ones included.
    merges: Vec<usize>,
    prior: Prior,
    counts: Counts,
    count_time: Duration,
    threads: usize,
    checkpoint: Option<Checkpoint>,
    /// What an earlier process had done.
    done: Done,
    resumed_bytes: u64,
}

impl Trainer {
    /// Checks the settings before any text is read.
    ///
    /// # Errors
    /// [`Error::Config`] for sizes that are too small, none or the same twice; special tokens or a pattern that are not
    /// those of the tokenizer to extend; one that cannot be extended.
    pub fn new(settings: Settings) -> Result<Self> {
        let Settings { specials, pattern, extend, .. } = &settings;
        let (own, prior) = match extend {
            None => (None, Prior::default()),
            Some(old) => (Some(old.specials().iter().map(|s| s.0.clone()).collect::<Vec<_>>()), prior_of(old)?),
        };
        let pattern = match (extend, pattern) {
            (None, given) => Pattern::new(given.as_deref().unwrap_or("gpt2"))?,
            (Some(old), None) => Pattern::new(old.pattern())?,
            (Some(old), Some(given)) if canonical_name(given) == canonical_name(old.pattern()) => Pattern::new(given)?,
            (Some(old), Some(given)) => {
                return Err(Error::Config(format!(
                    "pattern: found {given:?}; expected {:?}, that of the tokenizer to extend, or none",
                    old.pattern()
                )));
            }
        };
        let specials = match (own, specials) {
            (None, given) => given.clone().unwrap_or_default(),
            (Some(own), Some(given)) if *given != own => {
                return Err(Error::Config(format!(
                    "special tokens: found {given:?}; expected {own:?}, those of the tokenizer to extend, or none"
                )));
            }
            (Some(own), _) => own,
        };
        if settings.min_frequency == 0 || settings.max_token_length == 0 {
            return Err(Error::Config("min_frequency, max_token_length: found 0; expected 1 or more".into()));
        }
        let merges = settings.vocab_sizes.iter().map(|&size| {
            let room = room_for_merges(size, &specials)?;
            match extend {
                Some(old) if size < old.len() => Err(Error::Config(format!(
                    "vocab_size: found {size}; expected at least {}, as many as the tokenizer to extend has",
                    old.len()
                ))),
                _ => Ok(room),
            }
        });
        let merges = merges.collect::<Result<Vec<_>>>()?;
        let mut sorted = settings.vocab_sizes.clone();
        sorted.sort_unstable();
        let twice = sorted.iter().zip(sorted.iter().skip(1)).find(|(a, b)| a == b);
        if let Some((size, _)) = twice {
            return Err(Error::Config(format!("vocab_size: found {size} twice; expected different sizes")));
        }
        if sorted.is_empty() {
            return Err(Error::Config("vocab_size: found none; expected one size or more".into()));
        }
        let memory = settings.memory.clone().map_or_else(|| Memory::new(None, None), Ok)?;
        let splitter = Splitter::new(Arc::new(pattern), &specials)?;
        Ok(Self {
            counts: Counts::new(splitter, settings.policy, memory),
            specials,
            merges,
            prior,
            settings,
            count_time: Duration::ZERO,
            threads: 1,
            checkpoint: None,
            done: Done::default(),
            resumed_bytes: 0,
        })
    }

    /// A run on counts that are there; special tokens and pattern are theirs, and must be those of `extend`.
    pub fn from_counts(counts: Counts, settings: Settings, threads: usize) -> Result<Self> {
        let splitter = counts.splitter();
        let (specials, pattern) = (Some(splitter.specials().to_vec()), Some(splitter.pattern().name().to_string()));
        Ok(Self { counts, threads, ..Self::new(Settings { specials, pattern, ..settings })? })
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
        self.counts.add_files(&inputs, threads, chunk_bytes, progress)?;
        self.threads = threads;
        self.count_time += start.elapsed();
        Ok(())
    }

    /// As [`Self::add_files`], kept at `checkpoint` every so often, when all is counted, and when interrupted if that is
    /// done at once: a chunk that is being read then is left for the next time, those that were handed out are counted. The
    /// merges that follow are kept there too. Goes on from what is there. No other text may be added.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn add_files_and_keep(
        &mut self,
        inputs: InputSpec,
        threads: usize,
        chunk_bytes: usize,
        (checkpoint, every): (&Path, Option<Duration>),
        progress: &Progress,
    ) -> Result<()> {
        let start = Instant::now();
        let mut settings = self.names();
        let InputSpec { field, limit_bytes, sample, seed, .. } = &inputs;
        settings.push(("part of the inputs".into(), format!("{field:?} {limit_bytes:?} {sample:?} {seed}")));
        let inputs = Inputs::of(inputs)?;
        if !inputs.can_be_read_again() {
            let what = "checkpoint: found standard input, which cannot be read again; expected files";
            return Err(Error::Config(what.into()));
        }
        self.threads = threads;
        for (n, path) in (1..).zip(inputs.paths()) {
            settings.push(input(n, path)?);
        }
        let memory = self.settings.memory.clone().map_or_else(|| Memory::new(None, None), Ok)?;
        let (mut kept, counts, done) = Checkpoint::open(checkpoint, settings, every, memory)?;
        self.done = done;
        progress.begin(Stage::Count, inputs.total_bytes());
        let splitter = Arc::clone(self.counts.splitter());
        let chunk_bytes = self.counts.chunk_bytes(threads, chunk_bytes);
        let mut reader = self.counts.reader(&inputs, &splitter, chunk_bytes, progress);
        let mut goes_on = true;
        if let Some(counts) = counts {
            self.counts = counts;
            let about = self.counts.about()?;
            self.resumed_bytes = about.bytes;
            progress.add_pretokens(about.pretokens);
            // What is passed over in the file where it goes on, the reader tells.
            progress.add(inputs.bytes_before(about.next));
            match about.next {
                Some(from) => reader = reader.starting_at(from),
                None => goes_on = false,
            }
        }
        let keep = progress.grace();
        while goes_on {
            let (before, at) = (inputs.text_bytes(), self.counts.about()?.next);
            let paused = OnceLock::new();
            let pause = |words| {
                // However often it is due, there is something new to keep.
                let pause = progress.stopped() || (inputs.text_bytes() > before && kept.are_counts_due(words));
                if pause {
                    paused.get_or_init(Instant::now);
                }
                Ok(pause)
            };
            self.counts.add_part(&inputs, &reader, (threads, chunk_bytes), (progress, &keep), pause)?;
            let next = self.counts.about()?.next;
            goes_on = next.is_some();
            if next != at || inputs.text_bytes() > before {
                kept.save_counts(&mut self.counts, *paused.get_or_init(Instant::now), &keep)?;
            }
            progress.check()?;
        }
        self.checkpoint = Some(kept);
        self.count_time += start.elapsed();
        Ok(())
    }

    /// All that decides the result, besides the inputs.
    fn names(&self) -> Vec<(String, String)> {
        let Settings { vocab_sizes, rule, policy, min_frequency, max_token_length, extend, .. } = &self.settings;
        let names = [
            ("vocab_size", format!("{vocab_sizes:?}")),
            ("special_tokens", format!("{:?}", self.specials)),
            ("pattern", self.counts.splitter().pattern().name().into()),
            ("tie_break", format!("{rule:?}")),
            ("errors", format!("{policy:?}")),
            ("min_frequency", min_frequency.to_string()),
            (
                "max_token_length",
                if *max_token_length == usize::MAX { "any".into() } else { max_token_length.to_string() },
            ),
            ("extend", extend.as_ref().map_or("none".into(), Vocab::hash)),
            ("Unicode", UNICODE_VERSION.into()),
        ];
        names.map(|(name, value)| (name.to_string(), value)).into()
    }

    /// Counts one document.
    pub fn add_document(&mut self, text: &[u8]) -> Result<()> {
        let start = Instant::now();
        self.counts.add_text(text)?;
        self.count_time += start.elapsed();
        Ok(())
    }

    /// Learns the merges: a vocabulary for each size, in the order asked for; and where the run is kept, for the caller to
    /// discard when these are saved.
    pub fn finish(mut self, progress: &Progress) -> Result<(Vec<Vocab>, TrainStats, Option<Checkpoint>)> {
        let start = Instant::now();
        progress.begin(Stage::Layout, 0);
        let about = self.counts.about()?;
        let least = self.settings.min_frequency;
        let most = self.merges.iter().copied().max().unwrap_or_default();
        let words = self.counts.words(least, most, progress)?;
        let kept_pretokens = words.len();
        let distinct_pretokens = match least {
            1 => kept_pretokens,
            _ => usize::try_from(self.counts.distinct(progress)?).unwrap_or(usize::MAX),
        };
        let (splitter, spilled_runs) = (Arc::clone(self.counts.splitter()), self.counts.spilled_runs());
        // The tables have done their work.
        drop(self.counts);
        let prior_merges = self.prior.pairs().len();
        let Done { pairs: done, counts: mut done_counts, ties: done_ties } = self.done;
        let options = Options {
            merges: most,
            rule: self.settings.rule,
            min_frequency: least,
            max_token_length: self.settings.max_token_length,
            prior: self.prior.and(&done)?,
            threads: self.threads,
        };
        let (keeps, mut kept) = (self.checkpoint.is_some(), self.checkpoint);
        let mut keep = |pairs: &[Pair], counts: &[u64], ties: u64, interrupted: bool| match &mut kept {
            Some(kept) if interrupted || kept.are_merges_due() => {
                let counts = [&done_counts, counts].concat();
                kept.save_merges(&Done { pairs: pairs[prior_merges..].to_vec(), counts, ties: done_ties + ties })
            }
            _ => Ok(()),
        };
        let keep: Option<&mut Keep<'_>> = if keeps { Some(&mut keep) } else { None };
        let mut merges = train_and_keep(&words, &options, progress, keep)?;
        done_counts.append(&mut merges.counts);
        (merges.counts, merges.ties) = (done_counts, merges.ties + done_ties);
        let merge_time = progress.began().map_or(0.0, |began| began.elapsed().as_secs_f64());
        let token = |id: u32| merges.tokens[id].to_vec();
        let news = merges.pairs[prior_merges..].iter().zip(&merges.counts);
        let stats = TrainStats {
            bytes: about.bytes,
            pretokens: about.pretokens,
            distinct_pretokens,
            kept_pretokens,
            merges: merges.counts.len(),
            requested_merges: most - prior_merges,
            prior_merges,
            ties: merges.ties,
            resumed_bytes: self.resumed_bytes,
            resumed_merges: done.len(),
            count_s: self.count_time.as_secs_f64(),
            layout_s: start.elapsed().as_secs_f64() - merge_time,
            merge_s: merge_time,
            threads: self.threads,
            spilled_runs,
            longest_token: merges.tokens.iter().max_by_key(|token| token.len()).unwrap_or_default().to_vec(),
            top_merges: news.take(TOP).map(|(&(a, b), &count)| (token(a), token(b), count)).collect(),
        };
        let pattern = splitter.pattern().name();
        let vocab = |merges: Merges| match &self.settings.extend {
            None => Vocab::from_training(merges, &self.specials, pattern),
            Some(old) => extended(old, &merges),
        };
        let (&size, others) = self.merges.split_last().unwrap_or((&0, &[]));
        let mut vocabs = others.iter().map(|&len| vocab(merges.clone().first(len))).collect::<Result<Vec<_>>>()?;
        vocabs.push(vocab(merges.first(size))?);
        Ok((vocabs, stats, kept))
    }
}
