//! `bytekiln.Counts`: counts of words that are saved, added and trained on.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use bytekiln_bpe::counts::{self, Memory};
use bytekiln_bpe::input::{DEFAULT_CHUNK_BYTES, Inputs};
use bytekiln_bpe::pretokenize::{Pattern, Splitter, TextPolicy};
use bytekiln_bpe::progress::Progress;
use bytekiln_bpe::trainer::Trainer;
use bytekiln_bpe::{Error, Result};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyIterator, PyString};
use pythonize::pythonize;

use crate::arguments::text_of;
use crate::error::{OrRaise, to_python};
use crate::inputs::{Paths, Spec};
use crate::tokenizer::Tokenizer;
use crate::{LOOK_EVERY, Sizes, settings, threads_or_default, trained, watched};

/// Bytes of documents that are counted at a time: the GIL is given back once for all of them.
const BATCH: usize = 256 << 10;

/// How often each word (pre-token) occurs in some text, and how the words were cut.
///
/// Counts are mergeable: the sum of those of any parts of a text's documents is that of the whole. Memory is bounded:
/// what exceeds `max_memory` bytes (default: half of the machine's) goes to sorted runs in a temporary folder.
///
/// Args:
///     special_tokens: hard boundaries in the text, as in `train_bpe`.
///     pattern: `gpt2`, `cl100k`, `o200k` or a regular expression, as in `train_bpe`.
///     errors: invalid UTF-8: `error`, `replace` or `bytes`, as in `train_bpe`.
///     max_memory: bytes that counting and training may take, 16 MiB or more.
///
/// Raises:
///     ConfigError: an argument that cannot work.
///
/// >>> from bytekiln import Counts
/// >>> counts = Counts()
/// >>> counts.add("low low lower")
/// >>> counts.most_common(2), len(counts)
/// ([(b' low', 1), (b' lower', 1)], 3)
#[pyclass(frozen, module = "bytekiln")]
pub struct Counts {
    inner: Mutex<counts::Counts>,
}

/// Bytes that `max_memory` stands for where nobody names any: half of the machine's, or of its container's.
#[pyfunction]
pub fn default_max_memory() -> u64 {
    Memory::default_cap()
}

/// The cap on memory; runs go beside `output`, where there is one.
pub fn memory(cap: Option<u64>, output: Option<PathBuf>) -> Result<Memory> {
    Memory::new(cap, output.as_deref())
}

/// Calls `add` with every document of an iterable of str or bytes, many at a time with the GIL released. Memory: one
/// batch, or one document that is larger.
///
/// # Errors
/// What `add` says, with the document's place in front; a signal.
pub fn for_each_document(
    py: Python<'_>,
    texts: &Bound<'_, PyAny>,
    mut add: impl FnMut(&[u8]) -> Result<()> + Send,
) -> PyResult<()> {
    let (mut batch, mut ends, mut first) = (Vec::new(), Vec::new(), 0);
    let mut flush = |batch: &[u8], ends: &[usize], first: usize| -> PyResult<()> {
        py.check_signals()?;
        let counted = py.detach(|| {
            let mut start = 0;
            for (i, &end) in ends.iter().enumerate() {
                add(&batch[start..end]).map_err(|error| match error {
                    Error::Text(what) => Error::Text(format!("texts[{}]: {what}", first + i)),
                    other => other,
                })?;
                start = end;
            }
            Ok(())
        });
        counted.or_raise(py)
    };
    for (index, text) in PyIterator::from_object(texts)?.enumerate() {
        if index % LOOK_EVERY == 0 {
            py.check_signals()?;
        }
        let text = text?;
        let bytes = match text.cast::<PyString>() {
            Ok(text) => text_of(text)?.as_bytes(),
            Err(_) => text.extract::<&[u8]>()?,
        };
        if batch.len() + bytes.len() > BATCH {
            flush(&batch, &ends, first)?;
            batch.clear();
            ends.clear();
            first = index;
        }
        if bytes.len() > BATCH {
            // Where it lies: no copy.
            flush(bytes, &[bytes.len()], index)?;
            first = index + 1;
        } else {
            batch.extend_from_slice(bytes);
            ends.push(batch.len());
        }
    }
    flush(&batch, &ends, first)
}

impl Counts {
    fn from(counts: counts::Counts) -> Self {
        Self { inner: Mutex::new(counts) }
    }

    /// Works on the counts with the GIL released: whoever waits for them holds nothing that the worker needs.
    fn with<R: Send>(&self, work: impl FnOnce(&mut counts::Counts) -> Result<R> + Send) -> Result<R> {
        // A panic in another call is a defect of ours; what it left behind is not to be trusted.
        let broken = |_| Error::Config("counts: an earlier call failed inside; expected to begin anew".into());
        work(&mut *self.inner.lock().map_err(broken)?)
    }

    fn copy(&self, py: Python<'_>) -> PyResult<counts::Counts> {
        watched(py, None, |progress| self.with(|counts| counts.copy(progress)))
    }
}

#[pymethods]
impl Counts {
    #[new]
    #[pyo3(signature = (*, special_tokens=Vec::new(), pattern="gpt2", errors="error", max_memory=None), text_signature = "(*, special_tokens=(), pattern='gpt2', errors='error', max_memory=None)")]
    fn new(
        py: Python<'_>,
        special_tokens: Vec<String>,
        pattern: &str,
        errors: &str,
        max_memory: Option<u64>,
    ) -> PyResult<Self> {
        empty(special_tokens, pattern, errors, memory(max_memory, None)).map(Self::from).or_raise(py)
    }

    /// Count the words of files, or of `Inputs`; no word crosses the border of a file or a record.
    ///
    /// Args:
    ///     threads: default: one a core, fewer where `max_memory` has no room for them. Counts never depend on it.
    ///     beside: the output that will be written: what exceeds `max_memory` goes to its folder, unless TMPDIR says
    ///         another. Default: the system's temporary folder.
    ///     progress: called as `progress("count", bytes_done, bytes_total)`.
    ///
    /// Raises:
    ///     FileError, TextError, ConfigError.
    #[staticmethod]
    #[pyo3(signature = (files, *, special_tokens=Vec::new(), pattern="gpt2", errors="error", threads=None, max_memory=None, beside=None, progress=None), text_signature = "(files, *, special_tokens=(), pattern='gpt2', errors='error', threads=None, max_memory=None, beside=None, progress=None)")]
    #[expect(clippy::too_many_arguments, reason = "keyword-only options of the Python function")]
    fn from_files(
        py: Python<'_>,
        files: Spec,
        special_tokens: Vec<String>,
        pattern: &str,
        errors: &str,
        threads: Option<usize>,
        max_memory: Option<u64>,
        beside: Option<PathBuf>,
        progress: Option<Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let mut counts = empty(special_tokens, pattern, errors, memory(max_memory, beside)).or_raise(py)?;
        let threads = threads_or_default(py, threads)?;
        let counts = watched(py, progress, |progress| {
            counts.add_files(&Inputs::of(files.0)?, threads, DEFAULT_CHUNK_BYTES, progress)?;
            Ok(counts)
        })?;
        Ok(Self::from(counts))
    }

    /// Read counts files, and add them up: a path, or several. They are checked at once and read as streams later.
    ///
    /// Raises:
    ///     FormatError: a file is no counts file, damaged, cut off, or of a newer version.
    ///     ConfigError: two files were counted with different patterns, special tokens or policies.
    #[staticmethod]
    #[pyo3(signature = (paths, *, max_memory=None, beside=None))]
    fn load(py: Python<'_>, paths: Paths, max_memory: Option<u64>, beside: Option<PathBuf>) -> PyResult<Self> {
        let (memory, paths) = (memory(max_memory, beside).or_raise(py)?, paths.0);
        watched(py, None, |progress| counts::Counts::load(&paths, memory, progress)).map(Self::from)
    }

    /// Count one document, str or bytes.
    ///
    /// Raises:
    ///     TextError: invalid UTF-8 under `errors="error"`; nothing of it is counted.
    fn add(&self, py: Python<'_>, text: &Bound<'_, PyAny>) -> PyResult<()> {
        let bytes = match text.cast::<PyString>() {
            Ok(text) => text_of(text)?.as_bytes(),
            Err(_) => text.extract::<&[u8]>()?,
        };
        py.detach(|| self.with(|counts| counts.add_text(bytes))).or_raise(py)
    }

    /// Count documents from an iterable of str or bytes, in constant memory; no word crosses from one to the next.
    ///
    /// Raises:
    ///     TextError: invalid UTF-8 under `errors="error"`; the documents before it are counted.
    fn add_documents(&self, py: Python<'_>, texts: &Bound<'_, PyAny>) -> PyResult<()> {
        if texts.is_instance_of::<PyString>() || texts.is_instance_of::<PyBytes>() {
            let what = "texts: found one text; expected an iterable of texts, such as [text]";
            return Err(to_python(py, &Error::Config(what.into())));
        }
        for_each_document(py, texts, |text| self.with(|counts| counts.add_text(text)))
    }

    /// The sum; both stay as they are.
    ///
    /// Raises:
    ///     ConfigError: they were counted with different patterns, special tokens or policies; 2^64 words or more.
    fn __add__(&self, py: Python<'_>, other: &Bound<'_, Self>) -> PyResult<Self> {
        let (mut sum, other) = (self.copy(py)?, other.get().copy(py)?);
        let sum = watched(py, None, |progress| {
            sum.add(&other, progress)?;
            Ok(sum)
        })?;
        Ok(Self::from(sum))
    }

    /// Write a counts file (docs/scale.md), atomically; equal counts give equal bytes. Returns what it holds:
    /// pattern, pattern_hash, special_tokens, special_tokens_hash, errors, unicode, bytes, pretokens, documents,
    /// distinct_pretokens, spilled_runs.
    ///
    /// Raises:
    ///     OutputExistsError: it exists and `overwrite` is false.
    ///     FileError: the folder is missing or cannot be written.
    #[pyo3(signature = (path, *, overwrite=false, progress=None))]
    fn save<'py>(
        &self,
        py: Python<'py>,
        path: PathBuf,
        overwrite: bool,
        progress: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let saved = watched(py, progress, |progress| self.with(|counts| counts.save(&path, overwrite, progress)))?;
        Ok(pythonize(py, &saved)?)
    }

    /// Train a tokenizer on them; the pattern and the special tokens are those that counted.
    ///
    /// Args:
    ///     vocab_size: tokens in all, as in `train_bpe`.
    ///     tie_break: as in `train_bpe`.
    ///     min_frequency: rarer words are left out; they take no memory either.
    ///     threads: that lay the words out; default: one a core. Merges never depend on it.
    ///     progress: called as `progress(stage, done, total)`.
    ///
    /// Raises:
    ///     ConfigError: vocabulary too small; merging needs more than `max_memory`.
    #[pyo3(signature = (vocab_size, *, tie_break="lexicographic", min_frequency=1, threads=None, progress=None))]
    fn train(
        &self,
        py: Python<'_>,
        vocab_size: i64,
        tie_break: &str,
        min_frequency: i64,
        threads: Option<usize>,
        progress: Option<Bound<'_, PyAny>>,
    ) -> PyResult<Tokenizer> {
        let settings = settings(py, Sizes::One(vocab_size), tie_break, min_frequency, None, None)?;
        let threads = threads_or_default(py, threads)?;
        let trainer = Trainer::from_counts(self.copy(py)?, settings, threads).or_raise(py)?;
        let (vocabs, ..) = watched(py, progress, |progress| trainer.finish(progress))?;
        Tokenizer::from_vocab(py, vocabs.into_iter().next().ok_or(Error::Interrupted))
    }

    /// The `n` most frequent words with their counts, equals in the order of their bytes.
    fn most_common<'py>(&self, py: Python<'py>, n: usize) -> PyResult<Vec<(Bound<'py, PyBytes>, u64)>> {
        let words = watched(py, None, |progress| self.with(|counts| counts.most_common(n, progress)))?;
        Ok(words.into_iter().map(|(word, count)| (PyBytes::new(py, &word), count)).collect())
    }

    /// How the words were cut and how much was counted: pattern, pattern_hash, special_tokens, special_tokens_hash,
    /// errors, unicode, bytes, pretokens, documents.
    #[getter]
    fn about<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let about = py.detach(|| self.with(|counts| counts.about())).or_raise(py)?;
        Ok(pythonize(py, &about)?)
    }

    /// Tables that had no room in memory and went to disk.
    #[getter]
    fn spilled_runs(&self, py: Python<'_>) -> PyResult<u64> {
        py.detach(|| self.with(|counts| Ok(counts.spilled_runs()))).or_raise(py)
    }

    /// Number of distinct words.
    fn __len__(&self, py: Python<'_>) -> PyResult<usize> {
        let n = watched(py, None, |progress| self.with(|counts| counts.distinct(progress)))?;
        Ok(usize::try_from(n).unwrap_or(usize::MAX))
    }
}

fn empty(special_tokens: Vec<String>, pattern: &str, errors: &str, memory: Result<Memory>) -> Result<counts::Counts> {
    let policy = TextPolicy::from_name(errors)?;
    bytekiln_bpe::vocab::room_for_merges(u32::MAX as usize, &special_tokens)?;
    let splitter = Splitter::new(Arc::new(Pattern::new(pattern)?), &special_tokens)?;
    Ok(counts::Counts::new(splitter, policy, memory?))
}

/// `bpe-train --counts`: trains on counts files; returns the tokenizer, the statistics of the run and what the files
/// say of how they were counted.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "keyword-only options of the Python function")]
#[pyo3(signature = (counts, *, vocab_size, tie_break="lexicographic", min_frequency=1, max_token_length=None, extend=None, threads=None, max_memory=None, beside=None, progress=None))]
pub fn train_bpe_from_counts<'py>(
    py: Python<'py>,
    counts: Vec<PathBuf>,
    vocab_size: Sizes,
    tie_break: &str,
    min_frequency: i64,
    max_token_length: Option<i64>,
    extend: Option<Bound<'py, Tokenizer>>,
    threads: Option<usize>,
    max_memory: Option<u64>,
    beside: Option<PathBuf>,
    progress: Option<Bound<'py, PyAny>>,
) -> PyResult<(Vec<Tokenizer>, Py<PyAny>)> {
    let settings = settings(py, vocab_size, tie_break, min_frequency, max_token_length, extend)?;
    let memory = memory(max_memory, beside).or_raise(py)?;
    let threads = threads_or_default(py, threads)?;
    let done = watched(py, progress, |progress: &Progress| {
        let counts = counts::Counts::load(&counts, memory, progress)?;
        Trainer::from_counts(counts, settings, threads)?.finish(progress)
    })?;
    trained(py, done)
}
