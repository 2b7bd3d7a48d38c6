//! What a long job tells its caller while it runs, and how the caller stops it: a few atomics, no callbacks,
//! so that the core neither prints nor calls back into another language.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed};

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
    stop: AtomicBool,
}

impl Progress {
    /// Stage, units done and units in all.
    pub fn read(&self) -> (Stage, u64, u64) {
        let stage = match self.stage.load(Relaxed) {
            1 => Stage::Count,
            2 => Stage::Merge,
            3 => Stage::Encode,
            4 => Stage::Save,
            _ => Stage::Idle,
        };
        (stage, self.done.load(Relaxed), self.total.load(Relaxed))
    }

    /// Asks the job to stop; it ends with [`Error::Interrupted`] within milliseconds.
    pub fn stop(&self) {
        self.stop.store(true, Relaxed);
    }

    /// Begins a stage.
    pub(crate) fn begin(&self, stage: Stage, total: u64) {
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
        if self.stop.load(Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
    }
}
