//! Text → token files.
//!
//! In: inputs and an [`Encoder`]. Out: token files and their [`Manifest`]s. Called by the binding.
//!
//! Every thread takes the next chunk and encodes it; chunks are written in their order, by whoever brings the next one. So the bytes
//! written do not depend on the threads, and memory is two chunks a thread whatever the input's size.
//!
//! Rooms: `lengths` (what ids stand for) < `file` (one file) < `outlet` (one, or shards) < `resume` (how far a run is) < `part`
//! (which text is read), `split` (which documents go where) < `chunks` (text to ids, ids to their places), `run` (from the beginning
//! to the names of the files) < here.

mod chunks;
mod file;
mod lengths;
mod outlet;
mod part;
mod resume;
mod run;
mod split;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use self::file::with_word;
use self::lengths::Lengths;
use self::part::Stretch;
use self::resume::{EVERY, Place, Saver, state_path};
use self::split::Shares;
use crate::checkpoint::input;
use crate::encode::Encoder;
use crate::error::{Error, Result};
use crate::input::Inputs;
use crate::pretokenize::TextPolicy;
use crate::progress::{Progress, Stage};
use crate::tokens::{Dtype, Manifest, manifest_path};
use crate::train::TokenId;

/// Bytes of text a chunk: with its ids it stays in the second cache beside the words that are met often. 1 MB takes 4 % longer.
const CHUNK_BYTES: usize = 256 << 10;

/// How to encode files; the defaults are those of the command line.
#[derive(Debug, Clone)]
pub struct EncodeOptions {
    /// How an id is stored; `None`: the smallest type that fits.
    pub dtype: Option<Dtype>,
    /// End the text behind a file's last end-of-text token with one more; `None`: in files that contain one.
    pub append_eot: Option<bool>,
    /// Bytes that are not UTF-8.
    pub policy: TextPolicy,
    /// Replace an existing output.
    pub overwrite: bool,
    /// Threads that encode.
    pub threads: usize,
    /// Bytes of text a chunk.
    pub chunk_bytes: usize,
    /// Write files of so many ids.
    pub shard_tokens: Option<u64>,
    /// Stop after so many ids, in all outputs.
    pub max_tokens: Option<u64>,
    /// Parts that take documents: their names and shares.
    pub split: Vec<(String, f64)>,
    /// Which documents those are.
    pub seed: u64,
    /// Write where documents end.
    pub index: bool,
    /// Encode one part of the inputs, from 1, of so many.
    pub part: Option<(u64, u64)>,
    /// Time between two states for a run that is stopped.
    pub save_every: Duration,
}

impl Default for EncodeOptions {
    fn default() -> Self {
        Self {
            dtype: None,
            append_eot: None,
            policy: TextPolicy::Error,
            overwrite: false,
            threads: 1,
            chunk_bytes: CHUNK_BYTES,
            shard_tokens: None,
            max_tokens: None,
            split: Vec::new(),
            seed: 0,
            index: false,
            part: None,
            save_every: EVERY,
        }
    }
}

/// What was made.
#[derive(Debug)]
pub struct Encoding {
    /// Manifests of all files: that of the output, or of all of its shards and then theirs; then those of each part.
    pub manifests: Vec<(PathBuf, Manifest)>,
    /// Ids that an earlier run had written.
    pub resumed_tokens: u64,
}

/// Encodes `inputs`, in their order, into the token file `out`, or into shards and parts that are called after it.
///
/// A run that was stopped is gone on with by the next one that asks for the same.
pub fn encode_files(
    encoder: &Encoder,
    inputs: &Inputs,
    out: &Path,
    options: &EncodeOptions,
    progress: &Progress,
) -> Result<Encoding> {
    let vocab = encoder.vocab();
    let dtype = options.dtype.unwrap_or_else(|| Dtype::for_vocab(vocab.len()));
    let eot = vocab.eot();
    if options.append_eot == Some(true) && eot.is_none() {
        return Err(Error::Config(
            "append_eot: the tokenizer has no end-of-text token; expected one special token named <|endoftext|>".into(),
        ));
    }
    let shares = Shares::new(&options.split, options.seed)?;
    for (name, found) in [("shard_tokens", options.shard_tokens), ("max_tokens", options.max_tokens)] {
        if found == Some(0) {
            return Err(Error::Config(format!("{name}: found 0; expected 1 or more")));
        }
    }
    let paths: Vec<_> =
        [out.to_path_buf()].into_iter().chain(options.split.iter().map(|(name, _)| with_word(out, name))).collect();
    for path in &paths {
        refuse_input_as_output(inputs, path)?;
    }
    let stretch = Stretch::of(options, inputs, encoder.splitter())?;
    progress.begin(Stage::Encode, stretch.bytes(inputs));
    let looked_up = options.shard_tokens.is_some() || options.max_tokens.is_some() || !options.split.is_empty();
    let job = Job {
        encoder,
        inputs,
        options,
        dtype,
        eot,
        shares,
        lengths: looked_up.then(|| Lengths::new(vocab, dtype)),
        versions: (0..inputs.paths().len()).map(|n| version(inputs, n)).collect::<Result<_>>()?,
        stretch,
        full: AtomicBool::new(false),
        stale: AtomicBool::new(false),
    };
    let (state, settings) = (state_path(out), job.settings());
    let (outlets, place) = job.take_up(&paths, &state, &settings)?;
    let (mut resumed_tokens, resumed) = (place.as_ref().map_or(0, |place| place.tokens), place.is_some());
    let saver = Saver::new(state.clone(), settings.clone(), options.save_every, resumed);
    // What comes through a pipe cannot be read again.
    let saver = inputs.can_be_read_again().then_some(&saver);
    let first = || Place { file: job.stretch.start.0, ..Place::default() };
    let place = place.unwrap_or_else(first);
    let (mut outlets, place) = if place.finished {
        (outlets, place)
    } else {
        match job.run(outlets, place, saver, progress) {
            // What was encoded is of another text, and nobody wants it.
            Err(_) if options.overwrite && job.stale.load(Relaxed) => {
                resume::remove(&state);
                resumed_tokens = 0;
                progress.begin(Stage::Encode, job.stretch.bytes(inputs));
                let (outlets, _) = job.take_up(&paths, &state, &settings)?;
                job.run(outlets, first(), saver, progress)?
            }
            done => done?,
        }
    };
    let made = job.name_files(&mut outlets, &place, saver)?;
    Ok(Encoding { manifests: made, resumed_tokens })
}

/// What an input is, by its name, size and time: another one has changed.
fn version(inputs: &Inputs, number: usize) -> Result<String> {
    if !inputs.can_be_read_again() {
        return Ok("that comes through a pipe".into());
    }
    let path = inputs.paths().nth(number).unwrap_or_else(|| Path::new(""));
    input(number + 1, path).map(|(_, version)| version)
}

/// One call.
struct Job<'a> {
    encoder: &'a Encoder,
    inputs: &'a Inputs,
    options: &'a EncodeOptions,
    dtype: Dtype,
    eot: Option<TokenId>,
    shares: Shares,
    /// Where chunks are divided.
    lengths: Option<Lengths>,
    /// What the inputs were at the beginning.
    versions: Vec<String>,
    stretch: Stretch,
    /// No more ids are wanted.
    full: AtomicBool,
    /// An input is not what an unfinished run has read of it.
    stale: AtomicBool,
}

/// The output must not be one of the inputs, under whatever name.
fn refuse_input_as_output(inputs: &Inputs, out: &Path) -> Result<()> {
    for written in [out.to_path_buf(), manifest_path(out)] {
        let Ok(real) = written.canonicalize() else { continue };
        if inputs.paths().any(|path| path.canonicalize().is_ok_and(|input| input == real)) {
            return Err(Error::File { path: written, what: "is one of the inputs; expected another output".into() });
        }
    }
    Ok(())
}
