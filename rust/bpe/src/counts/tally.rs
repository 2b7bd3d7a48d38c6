//! Everything counted so far: a table in memory, sorted runs on disk.
//!
//! In: files, texts, counts files, other counts. Out: a counts file, the words in order, or what training reads. Called
//! by `trainer` and the binding.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use super::about::{About, add};
use super::limits::{Memory, give_back};
use super::merge::{Sorted, merge};
use super::need;
use super::read::Stored;
use super::runs::{Runs, push, reduce, spill};
use super::write::Writer;
use crate::atomic::AtomicFile;
use crate::count::{WordCounts, count_tables, count_text, join};
use crate::error::{Error, Result};
use crate::input::{ChunkReader, Inputs};
use crate::pretokenize::{Splitter, TextPolicy};
use crate::progress::{Progress, Stage};
use crate::words::{Frequencies, Words};

/// Counted words and how they were counted. Copies share what is on disk.
#[derive(Debug, Clone)]
pub struct Counts {
    /// In messages.
    name: String,
    splitter: Arc<Splitter>,
    policy: TextPolicy,
    /// Its pre-tokens are those of `runs`.
    about: About,
    table: WordCounts,
    runs: Runs,
    memory: Memory,
    /// Why what is here is only a part.
    broken: bool,
}

/// What a counts file that was written holds.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Saved {
    /// The head.
    #[serde(flatten)]
    pub about: About,
    /// Distinct words.
    pub distinct_pretokens: u64,
    /// Tables that had to go to disk on the way.
    pub spilled_runs: u64,
}

impl Counts {
    /// Nothing counted yet.
    pub fn new(splitter: Splitter, policy: TextPolicy, memory: Memory) -> Self {
        let about = About::new(&splitter, policy);
        let (table, runs, name) = (WordCounts::default(), Runs::default(), "counts".into());
        Self { name, splitter: Arc::new(splitter), policy, about, table, runs, memory, broken: false }
    }

    /// The sum of counts files, which are checked here and read when they are needed.
    ///
    /// # Errors
    /// [`Error::Format`] for what is no whole, undamaged counts file; [`Error::Config`], naming both files, where
    /// pattern, special tokens, policy or Unicode version differ, and for 2⁶⁴ words or more.
    pub fn load(paths: &[PathBuf], memory: Memory, progress: &Progress) -> Result<Self> {
        Self::load_files(paths, memory, progress, false)
    }

    /// What a checkpoint keeps: the counts of a part of the text, or of all.
    pub(crate) fn load_kept(path: &Path, memory: Memory) -> Result<Self> {
        Self::load_files(&[path.into()], memory, &Progress::default(), true)
    }

    fn load_files(paths: &[PathBuf], memory: Memory, progress: &Progress, parts: bool) -> Result<Self> {
        let Some((first, others)) = paths.split_first() else {
            return Err(Error::Config("counts: found none; expected at least one counts file".into()));
        };
        let open = |path: &PathBuf| {
            let stored = Stored::open(path)?;
            let name = path.display().to_string();
            if stored.about.next.is_some() && !parts {
                let what = "holds the counts of a part of its text, as a checkpoint does; expected those of all of it";
                return Err(Error::Config(format!("{name}: {what}")));
            }
            Ok((stored, name))
        };
        let (stored, name) = open(first)?;
        let (splitter, policy) = stored.about.splitter(&name)?;
        let mut this = Self::new(splitter, policy, memory);
        // Hashes of the names, and the version of Unicode, are those of the file.
        this.about.add(&stored.about, ("this version of bytekiln", &name))?;
        let fan_in = this.memory.share(1, 0).fan_in;
        let runs = Mutex::default();
        push(&runs, stored, false, &this.memory.folder, fan_in, progress)?;
        for path in others {
            progress.check()?;
            let (stored, other) = open(path)?;
            this.about.add(&stored.about, (&name, &other))?;
            push(&runs, stored, false, &this.memory.folder, fan_in, progress)?;
        }
        this.runs = runs.into_inner().map_err(|_| Error::Interrupted)?;
        this.name = name;
        Ok(this)
    }

    /// How the words were cut, and how many there are.
    pub fn about(&self) -> Result<About> {
        let pretokens = add(self.about.pretokens, self.table.total()?)?;
        Ok(About { pretokens, ..self.about.clone() })
    }

    /// The pattern and the special tokens.
    pub fn splitter(&self) -> &Arc<Splitter> {
        &self.splitter
    }

    /// Tables that went to disk.
    pub fn spilled_runs(&self) -> u64 {
        self.runs.spilled
    }

    /// Another cap, for what comes.
    pub fn set_memory(&mut self, memory: Memory) {
        self.memory = memory;
    }

    /// Words in the table and on disk, those that are in several places more than once.
    fn held_words(&self) -> u64 {
        self.table.len() as u64 + self.runs.runs.iter().map(|run| run.1.totals.words).sum::<u64>()
    }

    fn whole(&self) -> Result<()> {
        // A table says of itself when it was not let grow.
        if self.broken || self.table.whole().is_err() {
            let what = "an earlier text was counted in part only; expected to begin anew after such an error";
            return Err(Error::Config(format!("{}: {what}", self.name)));
        }
        Ok(())
    }

    fn spill_table(&mut self, progress: &Progress) -> Result<()> {
        if self.table.is_empty() {
            return Ok(());
        }
        let pretokens = add(self.about.pretokens, self.table.total()?)?;
        // From here on until the run is there, a failure loses words.
        self.broken = true;
        let stored = spill(std::mem::take(&mut self.table), &self.about, &self.memory.folder, progress)?;
        let runs = Mutex::new(std::mem::take(&mut self.runs));
        let share = self.memory.share(1, 0);
        push(&runs, stored, true, &self.memory.folder, share.fan_in, progress)?;
        self.runs = runs.into_inner().map_err(|_| Error::Interrupted)?;
        self.about.pretokens = pretokens;
        self.broken = false;
        Ok(())
    }

    /// Counts one document.
    ///
    /// # Errors
    /// [`Error::Text`] for invalid UTF-8 under [`TextPolicy::Error`]; nothing of it is counted then.
    pub fn add_text(&mut self, text: &[u8]) -> Result<()> {
        self.whole()?;
        if !self.table.is_empty() && self.table.peak_after(text.len()) > self.memory.share(1, 0).table {
            self.spill_table(&Progress::default())?;
        }
        if self.policy == TextPolicy::Error {
            // Before any of it is counted.
            count_text(text, &self.splitter, self.policy, &mut self.table).inspect_err(|_| {
                self.broken = std::str::from_utf8(text).is_ok();
            })?;
        } else {
            let counted = count_text(text, &self.splitter, self.policy, &mut self.table);
            self.broken = counted.is_err();
            counted?;
        }
        self.about.bytes += text.len() as u64;
        self.about.documents += 1;
        Ok(())
    }

    /// Counts a word, as it is, another `count` times: for counts that were made elsewhere.
    pub fn add_word(&mut self, word: &[u8], count: u64) -> Result<()> {
        self.whole()?;
        if word.is_empty() || count == 0 {
            return Err(Error::Config(format!(
                "counts: found {count} times a word of {} bytes; expected 1 or more of both",
                word.len()
            )));
        }
        if !self.table.is_empty() && self.table.peak_after(word.len()) > self.memory.share(1, 0).table {
            self.spill_table(&Progress::default())?;
        }
        self.table.add_many(word, count);
        Ok(())
    }

    /// Counts files; no word crosses from one to the next. After an error nothing of them is in.
    pub fn add_files(
        &mut self,
        inputs: &Inputs,
        threads: usize,
        chunk_bytes: usize,
        progress: &Progress,
    ) -> Result<()> {
        progress.begin(Stage::Count, inputs.total_bytes());
        let splitter = Arc::clone(&self.splitter);
        let chunk_bytes = self.chunk_bytes(threads, chunk_bytes);
        let reader = self.reader(inputs, &splitter, chunk_bytes, progress);
        let pause = |_| progress.check().map(|()| false);
        self.add_part(inputs, &reader, (threads, chunk_bytes), (progress, progress), pause)
    }

    /// Bytes of a chunk that `threads` may take under the cap, at most so many.
    pub(crate) fn chunk_bytes(&self, threads: usize, wanted: usize) -> usize {
        // Three quarters of the cap are free at least when a part begins.
        let free = Memory { cap: self.memory.cap / 4 * 3, folder: self.memory.folder.clone() };
        free.share(free.threads(threads), wanted).chunk.max(1)
    }

    /// A reader for [`Self::add_part`], within the cap.
    pub(crate) fn reader<'a>(
        &self,
        inputs: &'a Inputs,
        splitter: &'a Splitter,
        chunk_bytes: usize,
        progress: &'a Progress,
    ) -> ChunkReader<'a> {
        let reader = ChunkReader::new(inputs, splitter, chunk_bytes).stopped_by(progress);
        reader.with_most_uncut(self.memory.longest_uncut())
    }

    /// Counts what `reader` of `inputs` hands out until `pause`, which is told about how many words [`Self::save`] would
    /// write, says so. `keep` is what stops that from being brought together then.
    pub(crate) fn add_part(
        &mut self,
        inputs: &Inputs,
        reader: &ChunkReader<'_>,
        (threads, chunk_bytes): (usize, usize),
        (progress, keep): (&Progress, &Progress),
        pause: impl Fn(u64) -> Result<bool> + Sync,
    ) -> Result<()> {
        self.whole()?;
        if self.table.memory() as u64 > self.memory.cap / 4 {
            self.spill_table(keep)?;
        }
        let free = Memory {
            cap: self.memory.cap.saturating_sub(self.table.memory() as u64),
            folder: self.memory.folder.clone(),
        };
        let threads = free.threads(threads);
        let (share, about, runs) = (free.share(threads, chunk_bytes), &self.about, Mutex::<Runs>::default());
        let there = AtomicU64::new(self.held_words());
        let to_disk = |table: WordCounts| {
            there.fetch_add(table.len() as u64, Relaxed);
            let stored = spill(table, about, &free.folder, keep)?;
            push(&runs, stored, true, &free.folder, share.fan_in, keep)
        };
        let make_room = |table: &mut WordCounts, text: usize| {
            if !table.is_empty() && table.peak_after(text) > share.table {
                to_disk(std::mem::replace(table, WordCounts::stopped_by(keep)))?;
            }
            Ok(())
        };
        // The other threads' tables are about as large as one's own.
        let pause = |table: &WordCounts| pause(there.load(Relaxed) + (threads * table.len()) as u64);
        let (before, stops) = (inputs.text_bytes(), (progress, keep));
        let (tables, documents) = count_tables(reader, (inputs, self.policy), threads, stops, make_room, pause)?;
        let sum: usize = self.table.memory() + tables.iter().map(WordCounts::memory).sum::<usize>();
        if 4 * sum as u64 > self.memory.cap {
            give_back();
        }
        let mut joined = None;
        // Joined they may take twice as much, and while that grows as much again.
        if 4 * sum as u64 <= self.memory.cap {
            joined = join(tables, keep)?;
        } else {
            tables.into_iter().filter(|table| !table.is_empty()).try_for_each(to_disk)?;
        }
        let runs = runs.into_inner().map_err(|_| Error::Interrupted)?;
        let spilled = runs.runs.iter().try_fold(self.about.pretokens, |sum, run| add(sum, run.1.totals.pretokens))?;
        self.about.pretokens = spilled;
        self.about.bytes += inputs.text_bytes() - before;
        self.about.documents += documents;
        self.about.next = reader.position();
        self.join(joined, &runs, keep)
    }

    fn join(&mut self, table: Option<WordCounts>, runs: &Runs, progress: &Progress) -> Result<()> {
        if let Some(table) = table {
            if self.table.is_empty() {
                self.table = table;
            } else {
                // Until all is in, some of it is missing.
                self.broken = true;
                self.table.merge(table, progress)?;
                self.broken = false;
            }
        }
        self.runs.runs.extend(runs.runs.iter().cloned());
        self.runs.spilled += runs.spilled;
        Ok(())
    }

    /// A copy that takes a quarter of the cap at most; the larger part of both is on disk.
    pub fn copy(&mut self, progress: &Progress) -> Result<Self> {
        self.whole()?;
        if self.table.memory() as u64 > self.memory.cap / 4 {
            self.spill_table(progress)?;
        }
        Ok(self.clone())
    }

    /// Adds other counts.
    ///
    /// # Errors
    /// They were cut in another way; 2⁶⁴ words or more. Nothing is added then.
    pub fn add(&mut self, other: &Self, progress: &Progress) -> Result<()> {
        self.whole()?;
        other.whole()?;
        let mut about = self.about()?;
        about.add(&other.about()?, (&self.name, &other.name))?;
        let sum = self.table.memory() + 2 * other.table.memory();
        if 2 * sum as u64 > self.memory.cap {
            self.spill_table(progress)?;
        }
        self.about = About { pretokens: add(self.about.pretokens, other.about.pretokens)?, ..about };
        let table = (!other.table.is_empty()).then(|| other.table.clone());
        self.join(table, &other.runs, progress)?;
        reduce(&mut self.runs, &self.memory.folder, self.memory.share(1, 0).fan_in, progress)
    }

    /// Calls `f` with every word that occurs `least` times or more, in the order of their bytes.
    pub fn for_each(&mut self, least: u64, progress: &Progress, f: impl FnMut(&[u8], u64) -> Result<()>) -> Result<()> {
        self.whole()?;
        // A copy of the table is sorted beside it. Where there are runs, it is read beside theirs, in memory in which the
        // allocator may still hold what tables left behind when they grew.
        let room = if self.runs.runs.is_empty() { self.memory.cap } else { self.memory.cap / 2 };
        if 2 * self.table.memory() as u64 > room {
            self.spill_table(progress)?;
        }
        let fan_in = self.memory.share(1, 0).fan_in;
        reduce(&mut self.runs, &self.memory.folder, fan_in, progress)?;
        let mut sources = self.runs.sources();
        if !self.table.is_empty() {
            sources.push(Box::new(self.table.sorted_words(progress)?) as Box<dyn Sorted>);
        }
        merge(sources, least, progress, f)
    }

    /// Number of distinct words.
    pub fn distinct(&mut self, progress: &Progress) -> Result<u64> {
        match (self.table.is_empty(), &*self.runs.runs) {
            (false, []) => return self.whole().map(|()| self.table.len() as u64),
            (true, [(_, run)]) => return self.whole().map(|()| run.totals.words),
            _ => {}
        }
        let mut n = 0;
        self.for_each(1, progress, |_, _| {
            n += 1;
            Ok(())
        })?;
        Ok(n)
    }

    /// The `n` most frequent words, equals in the order of their bytes.
    pub fn most_common(&mut self, n: usize, progress: &Progress) -> Result<Vec<(Vec<u8>, u64)>> {
        let mut best = BinaryHeap::new();
        if n > 0 {
            self.for_each(1, progress, |word, count| {
                if best.len() < n {
                    best.push((Reverse(count), word.to_vec()));
                } else if best.peek().is_some_and(|(Reverse(worst), _)| count > *worst) {
                    // Words come in order: of equals the first stay.
                    best.pop();
                    best.push((Reverse(count), word.to_vec()));
                }
                Ok(())
            })?;
        }
        Ok(best.into_sorted_vec().into_iter().map(|(Reverse(count), word)| (word, count)).collect())
    }

    /// Writes a counts file; equal counts give equal bytes.
    pub fn save(&mut self, path: &Path, overwrite: bool, progress: &Progress) -> Result<Saved> {
        let file = AtomicFile::create(path, overwrite)?;
        let about = self.about()?;
        progress.begin(Stage::Save, self.held_words());
        let (mut writer, mut n) = (Writer::new(file, &about)?, 0);
        self.for_each(1, progress, |word, count| {
            n += 1;
            progress.add(1);
            writer.push(word, count)
        })?;
        writer.finish()?.commit()?;
        if 4 * self.table.memory() as u64 > self.memory.cap {
            // The sorted copy of the table is free, and counting goes on.
            give_back();
        }
        Ok(Saved { about, distinct_pretokens: n, spilled_runs: self.runs.spilled })
    }

    /// The words that occur `least` times or more, for training of `wanted` merges.
    ///
    /// # Errors
    /// [`Error::Config`] where merging them needs more than the cap, with the figure and what would fit.
    pub fn words(&mut self, least: u64, wanted: usize, progress: &Progress) -> Result<Words> {
        self.whole()?;
        // What the table's words take beside it: bytes, ends and counts.
        let aside = 32 * self.table.len() as u64 + self.table.long_bytes() as u64;
        if self.runs.runs.is_empty() && self.table.memory() as u64 + aside <= self.memory.cap {
            return self
                .table
                .frequent_words(least, progress, |frequent| need::check(frequent, wanted, self.memory.cap));
        }
        self.spill_table(progress)?;
        let mut frequencies = Frequencies::default();
        self.for_each(least, progress, |word, count| {
            frequencies.add(word.len(), count);
            Ok(())
        })?;
        need::check(&frequencies, wanted, self.memory.cap)?;
        let mut placer = frequencies.place();
        self.for_each(least, progress, |word, count| {
            placer.push(word, count);
            Ok(())
        })?;
        Ok(placer.into_words())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::input::Position;
    use crate::pretokenize::Pattern;

    #[test]
    fn a_job_that_is_over_stops_no_later_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        std::fs::write(&path, "wet clay").unwrap();
        let splitter = Splitter::new(Arc::new(Pattern::new("gpt2").unwrap()), &[]).unwrap();
        let mut counts = Counts::new(splitter, TextPolicy::Error, Memory::new(None, None).unwrap());
        let progress = Progress::default();
        counts.add_files(&Inputs::open(&[path]).unwrap(), 2, 4, &progress).unwrap();
        progress.stop();
        // So many that the table grows in steps, between which it asks.
        let words: Vec<_> = (0..500_000).map(|n| n.to_string()).collect();
        counts.add_text(words.join(" ").as_bytes()).unwrap();
        assert_eq!(counts.distinct(&Progress::default()).unwrap(), 500_002);
    }

    #[test]
    fn the_counts_of_a_part_are_taken_for_no_others() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("part.counts");
        let splitter = Splitter::new(Arc::new(Pattern::new("gpt2").unwrap()), &[]).unwrap();
        let mut part = Counts::new(splitter, TextPolicy::Error, Memory::new(None, None).unwrap());
        part.add_text(b"wet clay").unwrap();
        let at = Position { file: 1, offset: 9, room: None };
        part.about.next = Some(at);
        part.save(&path, false, &Progress::default()).unwrap();
        let memory = || Memory::new(None, None).unwrap();
        let said = Counts::load(std::slice::from_ref(&path), memory(), &Progress::default()).unwrap_err().to_string();
        assert!(said.contains("part.counts: holds the counts of a part"), "{said}");
        assert_eq!(Counts::load_kept(&path, memory()).unwrap().about().unwrap().next, Some(at));
    }
}
