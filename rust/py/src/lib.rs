//! Python binding of `bytekiln-bpe` and `bytekiln-kernels`: conversions only. The GIL is released round every long job, signals are
//! checked fifty times a second, errors change language in `error.rs`.

#![allow(clippy::needless_pass_by_value, reason = "arguments arrive converted, by value")]
#![allow(clippy::doc_markdown, reason = "these texts are shown by Python's help")]

mod arguments;
mod counts;
mod decode;
mod error;
mod ids;
mod inputs;
mod kernels;
mod stream;
mod tokenizer;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use bytekiln_bpe::checkpoint::Checkpoint;
use bytekiln_bpe::corpus::{self, EncodeOptions};
use bytekiln_bpe::input::{DEFAULT_CHUNK_BYTES, Inputs};
use bytekiln_bpe::pretokenize::{TextPolicy, UNICODE_VERSION};
use bytekiln_bpe::progress::Progress;
use bytekiln_bpe::tokens::{Dtype, checksum_of_file};
use bytekiln_bpe::train::TieBreak;
use bytekiln_bpe::trainer::{Settings, TrainStats, Trainer};
use bytekiln_bpe::vocab::Vocab;
use bytekiln_bpe::{Error, Result};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use pythonize::pythonize;

use crate::counts::{Counts, default_max_memory, train_bpe_from_counts};
use crate::error::{OrRaise, to_python};
use crate::inputs::Spec;
use crate::stream::TokenIterator;
use crate::tokenizer::Tokenizer;

/// How often a running job is looked at: signals and the progress call.
const LOOK: Duration = Duration::from_millis(20);
/// More threads than this are a slip of the finger.
const MOST_THREADS: usize = 1024;
/// Documents of an iterator between two looks at signals.
const LOOK_EVERY: usize = 64;

/// A stated number of threads, or one a core.
pub fn threads_or_default(py: Python<'_>, threads: Option<usize>) -> PyResult<usize> {
    match threads {
        Some(threads @ 1..=MOST_THREADS) => Ok(threads),
        Some(threads) => {
            let what = format!("threads: found {threads}; expected 1 to {MOST_THREADS}");
            Err(to_python(py, &Error::Config(what)))
        }
        None => Ok(thread::available_parallelism().map_or(1, usize::from)),
    }
}

/// Runs `job` in a thread of its own while this one calls `progress(stage, done, total)` and checks signals.
fn watched<R: Send>(
    py: Python<'_>,
    progress: Option<Bound<'_, PyAny>>,
    job: impl FnOnce(&Progress) -> Result<R> + Send,
) -> PyResult<R> {
    let shared = Progress::default();
    let shared = &shared;
    // A progress object may have a method `detail` beside being callable: the commands' bars have one.
    let detail = progress.as_ref().and_then(|call| call.getattr("detail").ok());
    let look = || -> PyResult<()> {
        py.check_signals()?;
        if let Some(call) = &progress {
            let (stage, done, total) = shared.read();
            if let Some(detail) = &detail {
                let (pretokens, merge) = shared.detail();
                let bytes = |b: &[u8]| PyBytes::new(py, b).unbind();
                detail.call1((pretokens, merge.map(|m| (bytes(&m.left), bytes(&m.right), m.count))))?;
            }
            call.call1((stage.name(), done, total))?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let (finished, wait) = channel();
        let worker = scope.spawn(move || {
            let result = job(shared);
            // The receiver lives until this thread is joined.
            let _ = finished.send(());
            result
        });
        let mut failure = None;
        let wait = Mutex::new(wait);
        let wait_once = || wait.lock().map_or(Err(RecvTimeoutError::Disconnected), |wait| wait.recv_timeout(LOOK));
        while py.detach(wait_once) == Err(RecvTimeoutError::Timeout) {
            if failure.is_none()
                && let Err(error) = look()
            {
                shared.stop();
                failure = Some(error);
            }
        }
        let result = py.detach(|| worker.join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        if let Some(failure) = failure {
            return Err(failure);
        }
        look()?;
        result.or_raise(py)
    })
}

/// One vocabulary size or several.
#[derive(FromPyObject)]
enum Sizes {
    One(i64),
    Many(Vec<i64>),
}

/// A whole number; what cannot be one becomes 0, which the core refuses.
fn natural<T: TryFrom<i64>>(value: i64, zero: T) -> T {
    T::try_from(value).unwrap_or(zero)
}

/// The settings of a run that have no part in counting.
fn settings(
    py: Python<'_>,
    sizes: Sizes,
    tie_break: &str,
    min_frequency: i64,
    max_token_length: Option<i64>,
    extend: Option<Bound<'_, Tokenizer>>,
) -> PyResult<Settings> {
    let sizes = match sizes {
        Sizes::One(size) => vec![size],
        Sizes::Many(sizes) => sizes,
    };
    Ok(Settings {
        vocab_sizes: sizes.into_iter().map(|size| natural(size, 0)).collect(),
        rule: TieBreak::from_name(tie_break).or_raise(py)?,
        min_frequency: natural(min_frequency, 0),
        max_token_length: max_token_length.map_or(usize::MAX, |length| natural(length, 0)),
        extend: extend.map(|old| old.get().encoder.vocab().clone()),
        ..Settings::default()
    })
}

/// What a run is kept in, held so that no other run takes it up, until it is discarded or nobody holds on to this.
#[pyclass(frozen, module = "bytekiln._core")]
struct CheckpointLock(Mutex<Option<Checkpoint>>);

#[pymethods]
impl CheckpointLock {
    /// Deletes its files: the tokenizers are saved.
    fn discard(&self, py: Python<'_>) -> PyResult<()> {
        let kept = self.0.lock().ok().and_then(|mut kept| kept.take());
        kept.map_or(Ok(()), |kept| py.detach(|| kept.discard())).or_raise(py)
    }
}

type Trained = (Vec<Vocab>, TrainStats, Option<Checkpoint>);

fn trained(py: Python<'_>, (vocabs, stats, kept): Trained) -> PyResult<(Vec<Tokenizer>, Py<PyAny>)> {
    let dict = pythonize(py, &stats)?;
    dict.set_item("checkpoint", kept.map(|kept| CheckpointLock(Mutex::new(Some(kept)))))?;
    let bytes = |b: &[u8]| PyBytes::new(py, b).unbind();
    dict.set_item("longest_token", bytes(&stats.longest_token))?;
    let top: Vec<_> = stats.top_merges.iter().map(|(a, b, count)| (bytes(a), bytes(b), *count)).collect();
    dict.set_item("top_merges", top)?;
    let tokenizers = vocabs.into_iter().map(|vocab| Tokenizer::from_vocab(py, Ok(vocab))).collect::<PyResult<_>>()?;
    Ok((tokenizers, dict.unbind()))
}

/// `bytekiln.train_bpe`, with the statistics of the run and the size of the chunks.
#[pyfunction]
#[pyo3(signature = (files, *, vocab_size, special_tokens=None, pattern=None, tie_break="lexicographic", errors="error", min_frequency=1, max_token_length=None, extend=None, threads=None, chunk_bytes=None, max_memory=None, beside=None, checkpoint=None, checkpoint_every=None, progress=None))]
#[expect(clippy::too_many_arguments, reason = "keyword-only options of the Python function")]
fn train_bpe(
    py: Python<'_>,
    files: Spec,
    vocab_size: Sizes,
    special_tokens: Option<Vec<String>>,
    pattern: Option<String>,
    tie_break: &str,
    errors: &str,
    min_frequency: i64,
    max_token_length: Option<i64>,
    extend: Option<Bound<'_, Tokenizer>>,
    threads: Option<usize>,
    chunk_bytes: Option<usize>,
    max_memory: Option<u64>,
    beside: Option<PathBuf>,
    checkpoint: Option<PathBuf>,
    checkpoint_every: Option<f64>,
    progress: Option<Bound<'_, PyAny>>,
) -> PyResult<(Vec<Tokenizer>, Py<PyAny>)> {
    let settings = settings(py, vocab_size, tie_break, min_frequency, max_token_length, extend)?;
    let policy = TextPolicy::from_name(errors).or_raise(py)?;
    let memory = Some(counts::memory(max_memory, beside).or_raise(py)?);
    let settings = Settings { specials: special_tokens, pattern, policy, memory, ..settings };
    let mut trainer = Trainer::new(settings).or_raise(py)?;
    let threads = threads_or_default(py, threads)?;
    let seconds = |every: f64| {
        Duration::try_from_secs_f64(every)
            .map_err(|_| Error::Config(format!("checkpoint_every: found {every}; expected seconds, 0 or more")))
    };
    let every = checkpoint_every.map(seconds).transpose().or_raise(py)?;
    let done = watched(py, progress, |progress| {
        let chunk_bytes = chunk_bytes.unwrap_or(DEFAULT_CHUNK_BYTES);
        match &checkpoint {
            None => trainer.add_files(files.0, threads, chunk_bytes, progress)?,
            Some(path) => trainer.add_files_and_keep(files.0, threads, chunk_bytes, (path, every), progress)?,
        }
        trainer.finish(progress)
    })?;
    trained(py, done)
}

/// `bytekiln.train_bpe_from_iterator`, with the statistics of the run.
#[pyfunction]
#[pyo3(signature = (texts, *, vocab_size, special_tokens=None, pattern=None, tie_break="lexicographic", errors="error", min_frequency=1, max_token_length=None, extend=None, progress=None))]
#[expect(clippy::too_many_arguments, reason = "keyword-only options of the Python function")]
fn train_bpe_from_iterator(
    py: Python<'_>,
    texts: &Bound<'_, PyAny>,
    vocab_size: Sizes,
    special_tokens: Option<Vec<String>>,
    pattern: Option<String>,
    tie_break: &str,
    errors: &str,
    min_frequency: i64,
    max_token_length: Option<i64>,
    extend: Option<Bound<'_, Tokenizer>>,
    progress: Option<Bound<'_, PyAny>>,
) -> PyResult<(Vec<Tokenizer>, Py<PyAny>)> {
    let settings = settings(py, vocab_size, tie_break, min_frequency, max_token_length, extend)?;
    let policy = TextPolicy::from_name(errors).or_raise(py)?;
    let mut trainer = Trainer::new(Settings { specials: special_tokens, pattern, policy, ..settings }).or_raise(py)?;
    counts::for_each_document(py, texts, |text| trainer.add_document(text))?;
    let done = watched(py, progress, |progress| trainer.finish(progress))?;
    trained(py, done)
}

/// `bytekiln.encode_files`, with the size of the chunks and the time between states; returns the files and their manifests, and
/// how many ids an earlier run had written.
#[pyfunction]
#[pyo3(signature = (tokenizer, inputs, out, *, dtype=None, append_eot=None, errors="error", overwrite=false, shard_tokens=None, split=None, seed=0, index=false, max_tokens=None, part=None, threads=None, chunk_bytes=None, save_every=None, progress=None))]
#[expect(clippy::too_many_arguments, reason = "keyword-only options of the Python function")]
#[expect(clippy::type_complexity, reason = "what Python unpacks")]
fn encode_files<'py>(
    py: Python<'py>,
    tokenizer: &Bound<'py, Tokenizer>,
    inputs: Spec,
    out: PathBuf,
    dtype: Option<&str>,
    append_eot: Option<bool>,
    errors: &str,
    overwrite: bool,
    shard_tokens: Option<i64>,
    split: Option<BTreeMap<String, f64>>,
    seed: u64,
    index: bool,
    max_tokens: Option<i64>,
    part: Option<(i64, i64)>,
    threads: Option<usize>,
    chunk_bytes: Option<usize>,
    save_every: Option<f64>,
    progress: Option<Bound<'py, PyAny>>,
) -> PyResult<(Vec<(OsString, Bound<'py, PyAny>)>, u64)> {
    let encoder = &tokenizer.get().encoder;
    let dtype = dtype.map(|name| Dtype::from_name(name, encoder.vocab().len())).transpose().or_raise(py)?;
    let defaults = EncodeOptions::default();
    let options = EncodeOptions {
        dtype,
        append_eot,
        policy: TextPolicy::from_name(errors).or_raise(py)?,
        overwrite,
        shard_tokens: shard_tokens.map(|count| natural(count, 0)),
        split: split.unwrap_or_default().into_iter().collect(),
        seed,
        index,
        max_tokens: max_tokens.map(|count| natural(count, 0)),
        part: part.map(|(number, of)| (natural(number, 0), natural(of, 0))),
        threads: threads_or_default(py, threads)?,
        chunk_bytes: chunk_bytes.unwrap_or(defaults.chunk_bytes),
        save_every: save_every.map_or(defaults.save_every, |every| Duration::from_secs_f64(every.clamp(0.0, 1e9))),
    };
    let made = watched(py, progress, |progress| {
        let inputs = Inputs::of(inputs.0)?;
        corpus::encode_files(encoder, &inputs, &out, &options, progress)
    })?;
    // Texts: for a path Python would load `pathlib`.
    let manifest = |(path, manifest): (PathBuf, _)| Ok((path.into_os_string(), pythonize(py, &manifest)?));
    Ok((made.manifests.into_iter().map(manifest).collect::<PyResult<_>>()?, made.resumed_tokens))
}

/// The files of an input, in the order of the text; opens none.
#[pyfunction]
fn find_inputs(py: Python<'_>, inputs: Spec) -> PyResult<Vec<PathBuf>> {
    inputs.0.find().or_raise(py)
}

/// Checksum of a file's bytes from `offset` on, as manifests spell it.
#[pyfunction]
#[pyo3(signature = (path, offset=0))]
fn payload_checksum(py: Python<'_>, path: PathBuf, offset: u64) -> PyResult<String> {
    py.detach(|| checksum_of_file(&path, offset)).or_raise(py)
}

/// The interpreter's lock is needed: `ids.rs` reads lists while nobody else can change them.
#[pymodule(gil_used = true)]
mod _core {
    use super::{Bound, PyModule, PyResult, UNICODE_VERSION};
    use pyo3::prelude::*;

    #[pymodule_export]
    use super::{
        CheckpointLock, Counts, TokenIterator, Tokenizer, default_max_memory, encode_files, find_inputs,
        payload_checksum, train_bpe, train_bpe_from_counts, train_bpe_from_iterator,
    };

    #[pymodule_export]
    use super::kernels::{
        activation_backward, activation_forward, attention_backward, attention_forward, block_backward, block_forward,
        borrow_threads, dropout, linear_backward, linear_forward, rms_norm_backward, rms_norm_forward, simd_level,
        swiglu_backward, swiglu_forward,
    };

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        module.add("UNICODE_VERSION", UNICODE_VERSION)
    }
}
