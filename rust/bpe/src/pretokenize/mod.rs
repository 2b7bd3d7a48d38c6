//! Text → pre-tokens: the pieces inside which BPE merges.
//!
//! In: text or bytes, and the special tokens that cut it. Out: [`Piece`]s in order, which cover the input
//! completely. Called by `count` (training) and `encode`; `input` asks it where a stream may be cut.
//!
//! The named patterns (`gpt2`, `cl100k`, `o200k`) have scanners, held against fancy-regex by property tests in `scan` and
//! against Python's `regex` on every code point by the Python tests. A user's own pattern runs on fancy-regex. It need
//! not cover the text: what lies between two matches is a piece of its own, so nothing is lost (Hugging Face's
//! `Split … isolated` does the same).
//!
//! Floors: `policy`, `pattern` < `splitter`.

mod pattern;
mod policy;
mod splitter;

#[cfg(test)]
pub(crate) use pattern::regex_ends;
pub use pattern::{CL100K, GPT2, O200K, Pattern, UNICODE_VERSION, canonical_name};
pub use policy::{TextPolicy, describe_invalid, first_invalid, valid_text};
pub use splitter::{Ends, Piece, Run, SplitStream, Splitter};
