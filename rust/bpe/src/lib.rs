//! Byte-level BPE: training, encoding and tokenizing of datasets, exact whatever the number of threads, the
//! chunk sizes and the splits of the input.
//!
//! Floors: `error` < `scan` < `pretokenize` (two rooms with floors of their own) < `sources` < `input` < `words`, `packed`, `sorted_words` < `word_counts` < `count` <
//! `counts` < `token_bytes` < `ties` < `prior` < `queue` < `merge` < `train` < `alphabet`, `listed` < `vocab`, `turns` < `encode` < `corpus`; `atomic` < `tokens` <
//! `corpus`; `counts` and `checkpoint` write through `atomic`; `corpus` (rooms with floors of
//! their own) names inputs as `checkpoint` does; `extend` joins `prior` and `vocab`, `trainer` all of training;
//! `disallowed` and `offsets` stand on `encode` and `vocab`; `formats` reads and writes a `vocab`; `naive` is the specification that tests hold all of it to.

mod alphabet;
pub mod atomic;
pub mod checkpoint;
pub mod corpus;
pub mod count;
pub mod counts;
pub mod disallowed;
pub mod encode;
pub mod error;
pub mod extend;
pub mod formats;
mod hash;
pub mod input;
mod listed;
mod merge;
pub mod naive;
pub mod offsets;
mod packed;
mod pages;
pub mod pretokenize;
pub mod prior;
pub mod progress;
mod queue;
mod scan;
mod sorted_words;
pub mod sources;
mod ties;
pub mod token_bytes;
pub mod tokens;
pub mod train;
pub mod trainer;
mod turns;
pub mod vocab;
mod word_counts;
pub mod words;

pub use error::{Error, Result};
