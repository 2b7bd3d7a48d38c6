//! Sorted runs on disk, merged into fewer whenever there are many.
//!
//! In: tables that have no room, counts files. Out: at most `fan_in` runs a level, so that file handles and memory stay
//! bounded however much is counted. Called by `tally`, by several threads.

use std::path::Path;
use std::sync::{Arc, Mutex};

use super::about::About;
use super::limits::give_back;
use super::merge::{Sorted, merge};
use super::read::Stored;
use super::write::{Unnamed, Writer};
use crate::count::WordCounts;
use crate::error::{Error, Result};
use crate::progress::Progress;

/// Runs, each with the number of merges behind it.
#[derive(Debug, Clone, Default)]
pub(super) struct Runs {
    pub(super) runs: Vec<(u32, Arc<Stored>)>,
    /// Tables that went to disk so far.
    pub(super) spilled: u64,
}

impl Runs {
    /// Sources of all their words.
    pub(super) fn sources(&self) -> Vec<Box<dyn Sorted>> {
        self.runs.iter().map(|(_, run)| Box::new(Arc::clone(run).reader()) as Box<dyn Sorted>).collect()
    }

    /// Runs of the lowest level that has `fan_in` or more, or any level's where `all` together are too many.
    fn take_full(&mut self, fan_in: usize, all: bool) -> Option<(u32, Vec<Arc<Stored>>)> {
        self.runs.sort_by_key(|run| run.0);
        let full = self.runs.chunk_by(|a, b| a.0 == b.0).find(|level| level.len() >= fan_in).map(|level| level[0].0);
        let from = match full {
            Some(level) => self.runs.partition_point(|run| run.0 < level),
            None if all && self.runs.len() > fan_in => 0,
            None => return None,
        };
        let taken: Vec<_> = self.runs.drain(from..from + fan_in).collect();
        Some((taken.last()?.0, taken.into_iter().map(|run| run.1).collect()))
    }
}

/// Adds a run; merges as many as `fan_in` of one level into one, outside of the lock.
pub(super) fn push(
    shared: &Mutex<Runs>,
    stored: Stored,
    spilled: bool,
    folder: &Path,
    fan_in: usize,
    progress: &Progress,
) -> Result<()> {
    let lock = || shared.lock().map_err(|_| Error::Interrupted);
    {
        let mut runs = lock()?;
        runs.runs.push((0, Arc::new(stored)));
        runs.spilled += u64::from(spilled);
    }
    loop {
        let Some((level, taken)) = lock()?.take_full(fan_in, false) else { return Ok(()) };
        let merged = join(&taken, folder, progress)?;
        lock()?.runs.push((level + 1, Arc::new(merged)));
    }
}

/// Merges until there are at most `fan_in` runs.
pub(super) fn reduce(runs: &mut Runs, folder: &Path, fan_in: usize, progress: &Progress) -> Result<()> {
    while runs.runs.len() > fan_in {
        let Some((level, taken)) = runs.take_full(fan_in, true) else { break };
        runs.runs.push((level + 1, Arc::new(join(&taken, folder, progress)?)));
    }
    Ok(())
}

fn join(runs: &[Arc<Stored>], folder: &Path, progress: &Progress) -> Result<Stored> {
    let mut about = runs[0].about.clone();
    for run in &runs[1..] {
        about.add(&run.about, (&runs[0].path.to_string_lossy(), &run.path.to_string_lossy()))?;
    }
    let mut writer = Writer::new(Unnamed::create(folder)?, &about)?;
    let sources = runs.iter().map(|run| Box::new(Arc::clone(run).reader()) as Box<dyn Sorted>).collect();
    merge(sources, 1, progress, |word, count| writer.push(word, count))?;
    let Unnamed { file, folder } = writer.finish()?;
    Stored::of(file, &folder)
}

/// Writes a table as a run; `about` says how it was counted, its totals are not of interest.
pub(super) fn spill(table: WordCounts, about: &About, folder: &Path, progress: &Progress) -> Result<Stored> {
    let pretokens = table.total()?;
    let about = About { bytes: 0, documents: 0, pretokens, ..about.clone() };
    let mut writer = Writer::new(Unnamed::create(folder)?, &about)?;
    merge(vec![Box::new(table.into_sorted_words(progress)?)], 1, progress, |word, count| writer.push(word, count))?;
    give_back();
    let Unnamed { file, folder } = writer.finish()?;
    Stored::of(file, &folder)
}
