//! Counts of words that outlive a process, exceed memory and add up: the map-reduce of training.
//!
//! In: texts, or counts files. Out: [`Counts`], which are saved, added, streamed in the order of their bytes, or turned
//! into [`Words`](crate::words::Words) for training. Called by `trainer` and the binding.
//!
//! Counts are a table in memory and any number of sorted runs on disk; a counts file is a run with a name. Runs are
//! written, read and merged as streams: memory is one block of each run that is read.
//!
//! Floors: `about` < `write`, `read` < `merge` < `runs` < `need` < `tally`.

pub mod about;
pub mod limits;
mod merge;
pub mod need;
mod read;
mod runs;
mod tally;
mod write;

pub use about::About;
pub use limits::Memory;
pub use tally::{Counts, Saved};
