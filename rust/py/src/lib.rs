//! Python binding of `bytekiln-bpe` and `bytekiln-kernels`: conversions only. The GIL is released round every long job, signals are
//! checked fifty times a second, errors change language in `error.rs`.

#![allow(clippy::needless_pass_by_value, reason = "arguments arrive converted, by value")]
#![allow(clippy::doc_markdown, reason = "these texts are shown by Python's help")]

mod counts;
mod error;
mod kernels;
mod tokenizer;

use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use bytekiln_bpe::corpus::{self, EncodeOptions};
use bytekiln_bpe::input::{DEFAULT_CHUNK_BYTES, Inputs};
use bytekiln_bpe::pretokenize::{TextPolicy, UNICODE_VERSION};
use bytekiln_bpe::progress::Progress;
use bytekiln_bpe::tokens::{Dtype, checksum_of_file};
use bytekiln_bpe::train::TieBreak;
use bytekiln_bpe::trainer::{TrainStats, Trainer};
use bytekiln_bpe::vocab::Vocab;
use bytekiln_bpe::{Error, Result};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::counts::{Counts, train_bpe_from_counts};
use crate::error::{OrRaise, to_python};
use crate::tokenizer::{TokenIterator, Tokenizer};

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
    let look = || -> PyResult<()> {
        py.check_signals()?;
        if let Some(call) = &progress {
            let (stage, done, total) = shared.read();
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
        let wait = std::sync::Mutex::new(wait);
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

fn trainer(
    py: Python<'_>,
    size: i64,
    specials: Vec<String>,
    pattern: &str,
    tie_break: &str,
    errors: &str,
) -> PyResult<Trainer> {
    let size = usize::try_from(size).unwrap_or(0);
    let made = TieBreak::from_name(tie_break).and_then(|rule| {
        let policy = TextPolicy::from_name(errors)?;
        Trainer::new(size, &specials, pattern, rule, policy)
    });
    made.or_raise(py)
}

fn trained(py: Python<'_>, (vocab, stats): (Vocab, TrainStats)) -> PyResult<(Tokenizer, Py<PyAny>)> {
    let json = serde_json::to_string(&stats).map_err(|e| PyValueError::new_err(e.to_string()))?;
    let dict = py.import("json")?.call_method1("loads", (json,))?;
    dict.set_item("longest_token", PyBytes::new(py, &stats.longest_token))?;
    Ok((Tokenizer::from_vocab(py, Ok(vocab))?, dict.unbind()))
}

/// `bytekiln.train_bpe`, with the statistics of the run and the size of the chunks.
#[pyfunction]
#[pyo3(signature = (files, *, vocab_size, special_tokens=Vec::new(), pattern="gpt2", tie_break="lexicographic", errors="error", threads=None, chunk_bytes=None, max_memory=None, beside=None, progress=None), text_signature = "(files, *, vocab_size, special_tokens=(), pattern='gpt2', tie_break='lexicographic', errors='error', threads=None, chunk_bytes=None, max_memory=None, beside=None, progress=None)")]
#[expect(clippy::too_many_arguments, reason = "keyword-only options of the Python function")]
fn train_bpe(
    py: Python<'_>,
    files: Vec<PathBuf>,
    vocab_size: i64,
    special_tokens: Vec<String>,
    pattern: &str,
    tie_break: &str,
    errors: &str,
    threads: Option<usize>,
    chunk_bytes: Option<usize>,
    max_memory: Option<u64>,
    beside: Option<PathBuf>,
    progress: Option<Bound<'_, PyAny>>,
) -> PyResult<(Tokenizer, Py<PyAny>)> {
    let mut trainer = trainer(py, vocab_size, special_tokens, pattern, tie_break, errors)?;
    trainer.set_memory(counts::memory(max_memory, beside).or_raise(py)?);
    let threads = threads_or_default(py, threads)?;
    let done = watched(py, progress, |progress| {
        trainer.add_files(&files, threads, chunk_bytes.unwrap_or(DEFAULT_CHUNK_BYTES), progress)?;
        trainer.finish(progress)
    })?;
    trained(py, done)
}

/// `bytekiln.train_bpe_from_iterator`, with the statistics of the run.
#[pyfunction]
#[pyo3(signature = (texts, *, vocab_size, special_tokens=Vec::new(), pattern="gpt2", tie_break="lexicographic", errors="error", progress=None), text_signature = "(texts, *, vocab_size, special_tokens=(), pattern='gpt2', tie_break='lexicographic', errors='error', progress=None)")]
#[expect(clippy::too_many_arguments, reason = "keyword-only options of the Python function")]
fn train_bpe_from_iterator(
    py: Python<'_>,
    texts: &Bound<'_, PyAny>,
    vocab_size: i64,
    special_tokens: Vec<String>,
    pattern: &str,
    tie_break: &str,
    errors: &str,
    progress: Option<Bound<'_, PyAny>>,
) -> PyResult<(Tokenizer, Py<PyAny>)> {
    let mut trainer = trainer(py, vocab_size, special_tokens, pattern, tie_break, errors)?;
    counts::for_each_document(py, texts, |text| trainer.add_document(text))?;
    let done = watched(py, progress, |progress| trainer.finish(progress))?;
    trained(py, done)
}

/// `bytekiln.encode_files`, with the size of the chunks; returns the manifest.
#[pyfunction]
#[pyo3(signature = (tokenizer, inputs, out, *, dtype=None, append_eot=None, errors="error", overwrite=false, threads=None, chunk_bytes=None, progress=None))]
#[expect(clippy::too_many_arguments, reason = "keyword-only options of the Python function")]
fn encode_files<'py>(
    py: Python<'py>,
    tokenizer: &Bound<'py, Tokenizer>,
    inputs: Vec<PathBuf>,
    out: PathBuf,
    dtype: Option<&str>,
    append_eot: Option<bool>,
    errors: &str,
    overwrite: bool,
    threads: Option<usize>,
    chunk_bytes: Option<usize>,
    progress: Option<Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let encoder = &tokenizer.get().encoder;
    let dtype = dtype.map(|name| Dtype::from_name(name, encoder.vocab().len())).transpose().or_raise(py)?;
    let options = EncodeOptions {
        dtype,
        append_eot,
        policy: TextPolicy::from_name(errors).or_raise(py)?,
        overwrite,
        threads: threads_or_default(py, threads)?,
        chunk_bytes: chunk_bytes.unwrap_or(DEFAULT_CHUNK_BYTES),
    };
    let manifest = watched(py, progress, |progress| {
        let inputs = Inputs::open(&inputs)?;
        corpus::encode_files(encoder, &inputs, &out, &options, progress)?.to_json()
    })?;
    py.import("json")?.call_method1("loads", (manifest,))
}

/// Checksum of a file's bytes from `offset` on, as manifests spell it.
#[pyfunction]
#[pyo3(signature = (path, offset=0))]
fn payload_checksum(py: Python<'_>, path: PathBuf, offset: u64) -> PyResult<String> {
    py.detach(|| checksum_of_file(&path, offset)).or_raise(py)
}

#[pymodule]
mod _core {
    use super::{Bound, PyModule, PyResult, UNICODE_VERSION};
    use pyo3::prelude::*;

    #[pymodule_export]
    use super::{
        Counts, TokenIterator, Tokenizer, encode_files, payload_checksum, train_bpe, train_bpe_from_counts,
        train_bpe_from_iterator,
    };

    #[pymodule_export]
    use super::kernels::{
        activation_backward, activation_forward, attention_backward, attention_forward, borrow_threads, simd_level,
        swiglu_backward, swiglu_forward,
    };

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        module.add("UNICODE_VERSION", UNICODE_VERSION)
    }
}
