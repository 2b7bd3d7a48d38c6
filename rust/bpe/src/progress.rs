//! What a long job tells its caller while it runs, and how the caller stops it: a few atomics, no callbacks,
//! so that the core neither prints nor calls back into another language. What costs more than an atomic is written only
//! when the caller has asked for it.

use std::sync::atomic::{
    AtomicBool, AtomicU8, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// The stages of the long jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// Nothing has begun.
    Idle,
    /// Reading text and counting pre-tokens; in bytes.
    Count,
    /// Merging; in merges.
    Merge,
    /// Encoding files; in bytes of text.
    Encode,
    /// Laying out the words that are to be merged.
    Layout,
    /// Adding up and writing counts; in words.
    Save,
}

impl Stage {
    /// The stage's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Count => "count",
            Self::Merge => "merge",
            Self::Encode => "encode",
            Self::Layout => "layout",
            Self::Save => "save",
        }
    }
}

/// Shared between a job and whoever watches it.
#[derive(Debug, Default)]
pub struct Progress {
    stage: AtomicU8,
    done: AtomicU64,
    total: AtomicU64,
    stop: Stop,
    began: Mutex<Option<Instant>>,
    pretokens: AtomicU64,
    asked: AtomicBool,
    merge: Mutex<Option<MergeShown>>,
}

/// A merge to be shown while training runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MergeShown {
    /// The first bytes of the left token, [`SHOWN_BYTES`] of them at most.
    pub left: Vec<u8>,
    /// Those of the right one.
    pub right: Vec<u8>,
    /// How often the two were neighbours.
    pub count: u64,
}

/// Time of a job that was asked to stop for keeping what it has: the caller waits for it.
const GRACE: Duration = Duration::from_millis(80);

/// Whether a job is to stop: what is asked of it, for those too who cannot hold on to its [`Progress`].
#[derive(Debug, Clone, Default)]
pub(crate) struct Stop {
    asked: Arc<AtomicBool>,
    /// When that was, once it was.
    at: Arc<OnceLock<Instant>>,
    /// How long after that it goes on.
    grace: Duration,
}

impl Stop {
    /// Whether to stop now.
    pub(crate) fn is_now(&self) -> bool {
        self.asked.load(Acquire)
            && (self.grace.is_zero() || self.at.get().is_none_or(|asked| asked.elapsed() >= self.grace))
    }
}

/// Bytes of a token that are shown.
pub const SHOWN_BYTES: usize = 32;

impl Progress {
    /// Stage, units done and units in all.
    pub fn read(&self) -> (Stage, u64, u64) {
        let stage = match self.stage.load(Relaxed) {
            1 => Stage::Count,
            2 => Stage::Merge,
            3 => Stage::Encode,
            4 => Stage::Layout,
            5 => Stage::Save,
            _ => Stage::Idle,
        };
        (stage, self.done.load(Relaxed), self.total.load(Relaxed))
    }

    /// Asks the job to stop; it ends with [`Error::Interrupted`] within milliseconds.
    pub fn stop(&self) {
        self.stop.at.get_or_init(Instant::now);
        self.stop.asked.store(true, Release);
    }

    /// For what a job keeps, which is shown to nobody: it stops [`GRACE`] after the job was asked to, all of it together.
    pub(crate) fn grace(&self) -> Self {
        Self { stop: Stop { grace: GRACE, ..self.stop.clone() }, ..Self::default() }
    }

    /// What says that the job is to stop.
    pub(crate) fn stop_flag(&self) -> Stop {
        self.stop.clone()
    }

    /// When the stage began.
    pub fn began(&self) -> Option<Instant> {
        self.began.lock().ok().and_then(|began| *began)
    }

    /// Pre-tokens counted so far, and a late merge: one from after the last time that this was asked, or none.
    pub fn detail(&self) -> (u64, Option<MergeShown>) {
        let merge = self.merge.lock().ok().and_then(|mut merge| merge.take());
        self.asked.store(true, Relaxed);
        (self.pretokens.load(Relaxed), merge)
    }

    /// Counts pre-tokens.
    pub(crate) fn add_pretokens(&self, count: u64) {
        self.pretokens.fetch_add(count, Relaxed);
    }

    /// Says which merge is in work, where someone has asked.
    pub(crate) fn show(&self, merge: impl FnOnce() -> MergeShown) {
        if self.asked.load(Relaxed) {
            self.asked.store(false, Relaxed);
            if let Ok(mut shown) = self.merge.lock() {
                *shown = Some(merge());
            }
        }
    }

    /// Whether the caller has asked to stop, and the grace that there may be is over.
    pub(crate) fn stopped(&self) -> bool {
        self.stop.is_now()
    }

    /// Begins a stage.
    pub(crate) fn begin(&self, stage: Stage, total: u64) {
        if let Ok(mut began) = self.began.lock() {
            *began = Some(Instant::now());
        }
        self.done.store(0, Relaxed);
        self.total.store(total, Relaxed);
        self.stage.store(stage as u8, Relaxed);
    }

    /// Adds finished units.
    pub(crate) fn add(&self, units: u64) {
        self.done.fetch_add(units, Relaxed);
    }

    /// Fails once the caller has asked to stop.
    pub(crate) fn check(&self) -> Result<()> {
        if self.stopped() { Err(Error::Interrupted) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_has_one_grace_from_the_stop_on() {
        let progress = Progress::default();
        let before = progress.grace();
        progress.stop();
        assert!(progress.stopped() && !before.stopped() && !progress.grace().stopped());
        std::thread::sleep(GRACE);
        assert!(before.stopped() && progress.grace().stopped());
    }

    #[test]
    fn a_merge_is_written_only_when_asked_for() {
        let progress = Progress::default();
        let merge = || MergeShown { left: b"a".to_vec(), right: b"b".to_vec(), count: 3 };
        progress.show(|| unreachable!("nobody asked"));
        assert_eq!(progress.detail(), (0, None));
        progress.show(merge);
        progress.show(|| unreachable!("it is there already"));
        progress.add_pretokens(7);
        assert_eq!(progress.detail(), (7, Some(merge())));
        assert_eq!(progress.detail(), (7, None));
    }
}
