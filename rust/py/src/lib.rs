//! Python binding of `bytekiln-bpe`: conversions only. The GIL is released round every long job, signals are
//! checked twenty times a second, errors change language in `error.rs`.

mod error;
mod tokenizer;

use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use bytekiln_bpe::corpus::{self, EncodeOptions};
use bytekiln_bpe::count::{WordCounts, count_files, count_text};
use bytekiln_bpe::input::{DEFAULT_CHUNK_BYTES, Inputs};
use bytekiln_bpe::pretokenize::{Pattern, Splitter, TextPolicy, UNICODE_VERSION};
use bytekiln_bpe::progress::Progress;
use bytekiln_bpe::tokens::{Dtype, checksum_of_file};
use bytekiln_bpe::train::{self, TieBreak};
use bytekiln_bpe::vocab::{Vocab, room_for_merges};
use bytekiln_bpe::{Error, Result};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyIterator, PyString};

use crate::error::{OrRaise, to_python};
use crate::tokenizer::{TokenIterator, Tokenizer, text_of};

/// How often a running job is looked at: signals and the progress call.
const LOOK: Duration = Duration::from_millis(50);
/// Text gathered from an iterator before it is counted with the GIL released.
const BATCH_BYTES: usize = 1 << 20;

/// A stated number of threads, or one a core.
pub fn threads_or_default(py: Python<'_>, threads: Option<usize>) -> PyResult<usize> {
    match threads {
        Some(0) => Err(to_python(py, &Error::Config("threads: found 0; expected at least 1".into()))),
        Some(threads) => Ok(threads),
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
        match failure {
            Some(failure) => Err(failure),
            None => {
                look()?;
                result.or_raise(py)
            }
        }
    })
}

/// What training needs besides text, checked before any text is read.
struct Plan {
    merges: usize,
    specials: Vec<String>,
    splitter: Splitter,
    rule: TieBreak,
    policy: TextPolicy,
}

impl Plan {
    fn new(vocab_size: i64, specials: Vec<String>, pattern: &str, tie_break: &str, errors: &str) -> Result<Self> {
        let vocab_size = usize::try_from(vocab_size).unwrap_or(0);
        Ok(Self {
            merges: room_for_merges(vocab_size, &specials)?,
            splitter: Splitter::new(Pattern::new(pattern)?.into(), &specials)?,
            rule: TieBreak::from_name(tie_break)?,
            policy: TextPolicy::from_name(errors)?,
            specials,
        })
    }

    fn train(&self, counted: Counted, progress: &Progress) -> Result<Trained> {
        let start = Instant::now();
        let words = counted.words.into_sorted();
        let merges = train::train(&words, self.merges, self.rule, progress)?;
        let vocab = Vocab::from_training(merges, &self.specials, self.splitter.pattern().name())?;
        let pretokens = words.iter().map(|word| word.1).sum();
        let merge_time = start.elapsed();
        let (bytes, count_time) = (counted.bytes, counted.time);
        Ok(Trained { vocab, bytes, pretokens, distinct: words.len(), count_time, merge_time })
    }
}

struct Counted {
    words: WordCounts,
    bytes: u64,
    time: Duration,
}

struct Trained {
    vocab: Vocab,
    bytes: u64,
    pretokens: u64,
    distinct: usize,
    count_time: Duration,
    merge_time: Duration,
}

impl Trained {
    fn into_python(self, py: Python<'_>, plan: &Plan, threads: usize) -> PyResult<(Tokenizer, Py<PyDict>)> {
        let stats = PyDict::new(py);
        stats.set_item("bytes", self.bytes)?;
        stats.set_item("pretokens", self.pretokens)?;
        stats.set_item("distinct_pretokens", self.distinct)?;
        stats.set_item("merges", self.vocab.merges().len())?;
        stats.set_item("requested_merges", plan.merges)?;
        stats.set_item("count_s", self.count_time.as_secs_f64())?;
        stats.set_item("merge_s", self.merge_time.as_secs_f64())?;
        stats.set_item("threads", threads)?;
        let longest = (0..self.vocab.len() as u32).filter(|&id| !self.vocab.is_special(id));
        let longest = longest.filter_map(|id| self.vocab.token(id)).max_by_key(|token| token.len());
        stats.set_item("longest_token", pyo3::types::PyBytes::new(py, longest.unwrap_or_default()))?;
        Ok((Tokenizer::from_vocab(py, Ok(self.vocab))?, stats.unbind()))
    }
}

#[pyfunction]
#[pyo3(signature = (files, *, vocab_size, special_tokens=Vec::new(), pattern="gpt2", tie_break="lexicographic", errors="error", threads=None, chunk_bytes=None, progress=None))]
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
    progress: Option<Bound<'_, PyAny>>,
) -> PyResult<(Tokenizer, Py<PyDict>)> {
    let plan = Plan::new(vocab_size, special_tokens, pattern, tie_break, errors).or_raise(py)?;
    let threads = threads_or_default(py, threads)?;
    let trained = watched(py, progress, |progress| {
        let start = Instant::now();
        let inputs = Inputs::open(&files)?;
        let chunk_bytes = chunk_bytes.unwrap_or(DEFAULT_CHUNK_BYTES);
        let words = count_files(&inputs, &plan.splitter, plan.policy, threads, chunk_bytes, progress)?;
        plan.train(Counted { words, bytes: inputs.total_bytes(), time: start.elapsed() }, progress)
    })?;
    trained.into_python(py, &plan, threads)
}

#[pyfunction]
#[pyo3(signature = (texts, *, vocab_size, special_tokens=Vec::new(), pattern="gpt2", tie_break="lexicographic", errors="error", progress=None))]
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
) -> PyResult<(Tokenizer, Py<PyDict>)> {
    let plan = Plan::new(vocab_size, special_tokens, pattern, tie_break, errors).or_raise(py)?;
    let (mut words, mut bytes, start) = (WordCounts::default(), 0, Instant::now());
    let mut batch: Vec<(usize, Vec<u8>)> = Vec::new();
    let mut batch_bytes = 0;
    let mut count = |batch: &mut Vec<(usize, Vec<u8>)>| {
        py.check_signals()?;
        let counted = py.detach(|| {
            batch.drain(..).try_for_each(|(index, text)| {
                count_text(&text, &plan.splitter, plan.policy, &mut words).map_err(|error| match error {
                    Error::Text(what) => Error::Text(format!("texts[{index}]: {what}")),
                    other => other,
                })
            })
        });
        counted.or_raise(py)
    };
    for (index, text) in PyIterator::from_object(texts)?.enumerate() {
        let text = text?;
        let text = match text.cast::<PyString>() {
            Ok(text) => text_of(text)?.as_bytes().to_vec(),
            Err(_) => text.extract::<&[u8]>()?.to_vec(),
        };
        bytes += text.len() as u64;
        batch_bytes += text.len();
        batch.push((index, text));
        if batch_bytes > BATCH_BYTES {
            count(&mut batch)?;
            batch_bytes = 0;
        }
    }
    count(&mut batch)?;
    let counted = Counted { words, bytes, time: start.elapsed() };
    let trained = watched(py, progress, |progress| plan.train(counted, progress))?;
    trained.into_python(py, &plan, 1)
}

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
    use super::{TokenIterator, Tokenizer, encode_files, payload_checksum, train_bpe, train_bpe_from_iterator};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        module.add("UNICODE_VERSION", UNICODE_VERSION)
    }
}
