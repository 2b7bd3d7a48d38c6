//! `bytekiln.Tokenizer`: the encoder as a frozen Python class. Texts and documentation are in `_core.pyi`.

use std::path::PathBuf;
use std::sync::Arc;

use bytekiln_bpe::Error;
use bytekiln_bpe::encode::{Allowed, EncodeStream, Encoder, Out};
use bytekiln_bpe::formats::{self, Format, SpecialNames};
use bytekiln_bpe::pretokenize::TextPolicy;
use bytekiln_bpe::tokens::Dtype;
use bytekiln_bpe::train::TokenId;
use bytekiln_bpe::vocab::Vocab;
use numpy::PyArray1;
use pyo3::buffer::{Element, PyBuffer};
use pyo3::exceptions::{PyOverflowError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyIterator, PyList, PyString};

use crate::error::{OrRaise, to_python};
use crate::threads_or_default;

/// Text shorter than this is encoded without releasing the interpreter: handing it over costs more.
const SHORT_TEXT: usize = 4096;

/// A byte-level BPE tokenizer: encodes, decodes, saves.
#[pyclass(frozen, module = "bytekiln._core", name = "Tokenizer")]
pub struct Tokenizer {
    pub encoder: Arc<Encoder>,
}

/// `"all"` or names of special tokens.
pub enum SpecialSet {
    All,
    Names(Vec<String>),
}

impl SpecialSet {
    fn allowed(&self) -> Allowed<'_> {
        match self {
            Self::All => Allowed::All,
            Self::Names(names) if names.is_empty() => Allowed::None,
            Self::Names(names) => Allowed::Only(names),
        }
    }

    const NONE: Self = Self::Names(Vec::new());
}

impl<'py> FromPyObject<'_, 'py> for SpecialSet {
    type Error = PyErr;

    fn extract(value: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        match value.extract::<String>() {
            Ok(text) if text == "all" => Ok(Self::All),
            Ok(text) => {
                let what = format!("special tokens: found the text {text:?}; expected \"all\" or a set of texts");
                Err(to_python(value.py(), &Error::Config(what)))
            }
            Err(_) => {
                let names = PyIterator::from_object(&value)?.map(|name| name?.extract::<String>());
                let mut names = names.collect::<PyResult<Vec<_>>>()?;
                names.sort_unstable();
                names.dedup();
                Ok(Self::Names(names))
            }
        }
    }
}

/// Special tokens as a list of texts or as texts with their ids.
#[derive(FromPyObject)]
pub enum SpecialArgument<'py> {
    Ids(Bound<'py, PyDict>),
    Texts(Vec<String>),
}

impl SpecialArgument<'_> {
    fn names(self) -> PyResult<SpecialNames> {
        match self {
            Self::Texts(texts) => Ok(texts.into_iter().map(|text| (text, None)).collect()),
            Self::Ids(ids) => ids.iter().map(|(text, id)| Ok((text.extract()?, Some(id.extract()?)))).collect(),
        }
    }
}

/// A text, or its UTF-8.
#[derive(FromPyObject)]
enum TextArgument<'py> {
    Text(Bound<'py, PyString>),
    Bytes(Bound<'py, PyBytes>),
}

#[derive(FromPyObject)]
enum VocabArgument {
    Path(PathBuf),
    Tokens(std::collections::BTreeMap<TokenId, Vec<u8>>),
}

#[derive(FromPyObject)]
enum MergesArgument {
    Path(PathBuf),
    Pairs(Vec<(Vec<u8>, Vec<u8>)>),
}

/// Bytes as the text that they are.
fn valid_utf8(bytes: &[u8]) -> bytekiln_bpe::Result<&str> {
    std::str::from_utf8(bytes).map_err(|e| {
        let at = e.valid_up_to();
        Error::Text(format!("text: byte offset {at}: invalid UTF-8; expected UTF-8, or encode_bytes(data, errors=...)"))
    })
}

/// Text of a Python string; a lone surrogate is not text.
pub fn text_of<'a>(text: &'a Bound<'_, PyString>) -> PyResult<&'a str> {
    text.to_str().map_err(|e| {
        let what = format!("text: {}; expected a string without lone surrogates", e.value(text.py()));
        to_python(text.py(), &Error::Text(what))
    })
}

impl Tokenizer {
    fn array<'py, T: numpy::Element + Copy + Sync>(
        &self,
        py: Python<'py>,
        text: &str,
        allowed: Allowed<'_>,
        disallowed: Allowed<'_>,
        threads: usize,
    ) -> PyResult<Bound<'py, PyArray1<T>>>
    where
        Vec<T>: Out,
    {
        let encoded = py.detach(|| {
            self.encoder.refuse(text, disallowed, allowed)?;
            let mut ids = Vec::new();
            self.encoder.encode_on_threads(text, allowed, threads, &mut ids).map(|()| ids)
        });
        encoded.or_raise(py).map(|ids| PyArray1::from_vec(py, ids))
    }

    pub fn from_vocab(py: Python<'_>, vocab: bytekiln_bpe::Result<Vocab>) -> PyResult<Self> {
        let encoder = vocab.and_then(Encoder::new).or_raise(py)?;
        Ok(Self { encoder: Arc::new(encoder) })
    }

    fn ids(&self, text: &Bound<'_, PyString>, allowed: &SpecialSet, disallowed: &SpecialSet) -> PyResult<Vec<TokenId>> {
        let (py, text) = (text.py(), text_of(text)?);
        let (allowed, disallowed) = (allowed.allowed(), disallowed.allowed());
        let work = || {
            let mut ids = Vec::with_capacity(text.len() / 3 + 8);
            self.encoder.refuse(text, disallowed, allowed)?;
            self.encoder.encode(text, allowed, &mut ids).map(|()| ids)
        };
        if text.len() < SHORT_TEXT { work() } else { py.detach(work) }.or_raise(py)
    }
}

#[pymethods]
impl Tokenizer {
    /// Read a tokenizer: `tokenizer.json`, `vocab.json` beside its `merges.txt`, a `.tiktoken` file, or a folder.
    ///
    /// The kind is told by the content. `special_tokens` (texts, or texts with ids) adds to those of the file;
    /// `pattern` overrides the file's and is required for `.tiktoken`, which names none.
    ///
    /// Raises:
    ///     FileError, FormatError, ConfigError.
    #[staticmethod]
    #[pyo3(signature = (path, *, special_tokens=None, pattern=None))]
    fn from_file(
        py: Python<'_>,
        path: PathBuf,
        special_tokens: Option<SpecialArgument<'_>>,
        pattern: Option<&str>,
    ) -> PyResult<Self> {
        let specials = special_tokens.map(SpecialArgument::names).transpose()?;
        Self::from_vocab(py, formats::read(&path, specials, pattern))
    }

    /// Build a tokenizer from GPT-2's pair of files, or from `{id: bytes}` and `[(bytes, bytes), …]`.
    ///
    /// Tokens that are neither a byte nor a merge's result are special tokens.
    ///
    /// Raises:
    ///     FileError, FormatError, ConfigError.
    #[staticmethod]
    #[pyo3(signature = (vocab, merges, *, special_tokens=None, pattern="gpt2"))]
    fn from_vocab_and_merges(
        py: Python<'_>,
        vocab: VocabArgument,
        merges: MergesArgument,
        special_tokens: Option<SpecialArgument<'_>>,
        pattern: &str,
    ) -> PyResult<Self> {
        let specials = special_tokens.map(SpecialArgument::names).transpose()?;
        let vocab = match (vocab, merges) {
            (VocabArgument::Path(vocab), MergesArgument::Path(merges)) => {
                formats::read_vocab_and_merges(&vocab, &merges, specials, pattern)
            }
            (VocabArgument::Tokens(tokens), MergesArgument::Pairs(pairs)) => {
                let tokens = tokens.into_iter().map(|(id, bytes)| (bytes, id)).collect();
                formats::from_parts(tokens, &pairs, specials, pattern)
            }
            _ => return Err(PyTypeError::new_err("vocab and merges: expected two paths, or a dict and a list")),
        };
        Self::from_vocab(py, vocab)
    }

    /// Read the text of a `tokenizer.json`.
    #[staticmethod]
    fn from_json(py: Python<'_>, text: &str) -> PyResult<Self> {
        Self::from_vocab(py, formats::from_json(text))
    }

    /// The text of the `tokenizer.json` that `save` writes; equal tokenizers give equal text.
    fn to_json(&self, py: Python<'_>) -> PyResult<String> {
        formats::to_json(self.encoder.vocab()).or_raise(py)
    }

    /// Write it, atomically: `tokenizer.json` (Hugging Face's, loaded by their library as it is), `vocab+merges`
    /// (a folder with GPT-2's `vocab.json` and `merges.txt`) or `tiktoken` (ranks; no pattern, no special tokens).
    ///
    /// Raises:
    ///     OutputExistsError: it exists and `overwrite` is false.
    ///     FileError: the folder is missing or cannot be written.
    #[pyo3(signature = (path, *, format="tokenizer.json", overwrite=false))]
    fn save(&self, py: Python<'_>, path: PathBuf, format: &str, overwrite: bool) -> PyResult<()> {
        let saved = Format::from_name(format).and_then(|f| formats::write(self.encoder.vocab(), &path, f, overwrite));
        saved.or_raise(py)
    }

    /// Every token's bytes by id; a special token's are those of its text.
    #[getter]
    fn vocab<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for id in 0..self.encoder.vocab().len() as TokenId {
            dict.set_item(id, PyBytes::new(py, self.encoder.vocab().token(id).unwrap_or_default()))?;
        }
        Ok(dict)
    }

    /// The merges as pairs of bytes, in order of priority.
    #[getter]
    fn merges<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, Bound<'py, PyBytes>)> {
        let vocab = self.encoder.vocab();
        let bytes = |id| PyBytes::new(py, vocab.token(id).unwrap_or_default());
        vocab.merges().iter().map(|m| (bytes(m.pair.0), bytes(m.pair.1))).collect()
    }

    /// Special tokens and their ids.
    #[getter]
    fn special_tokens<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for (text, id) in self.encoder.vocab().specials() {
            dict.set_item(text, id)?;
        }
        Ok(dict)
    }

    /// The pre-tokenization pattern: gpt2, cl100k, o200k or a regular expression.
    #[getter]
    fn pattern(&self) -> &str {
        self.encoder.splitter().pattern().name()
    }

    /// Number of tokens, special ones included; ids are 0 up to this.
    #[getter]
    fn n_vocab(&self) -> usize {
        self.encoder.vocab().len()
    }

    /// Id of `<|endoftext|>`, else of the only special token, else None.
    #[getter]
    fn eot_id(&self) -> Option<TokenId> {
        self.encoder.vocab().eot()
    }

    /// SHA-256 over all that decides ids; token files and checkpoints carry it.
    #[getter]
    fn hash(&self) -> &str {
        self.encoder.hash()
    }

    /// Ids of `text`.
    ///
    /// Args:
    ///     text: any string without lone surrogates.
    ///     allowed_special: special tokens to recognise, or "all"; the others are ordinary text.
    ///     disallowed_special: special tokens whose text is an error unless allowed, or "all" (tiktoken's default).
    ///
    /// Raises:
    ///     TextError: a disallowed special token, with its byte offset.
    #[pyo3(signature = (text, *, allowed_special=SpecialSet::NONE, disallowed_special=SpecialSet::NONE), text_signature = "($self, text, *, allowed_special=(), disallowed_special=())")]
    fn encode(
        &self,
        text: &Bound<'_, PyString>,
        allowed_special: SpecialSet,
        disallowed_special: SpecialSet,
    ) -> PyResult<Vec<TokenId>> {
        self.ids(text, &allowed_special, &disallowed_special)
    }

    /// `encode` with every special token taken as text.
    fn encode_ordinary(&self, text: &Bound<'_, PyString>) -> PyResult<Vec<TokenId>> {
        self.ids(text, &SpecialSet::NONE, &SpecialSet::NONE)
    }

    /// `encode` as an array of uint16, or of uint32 where the vocabulary has more than 65,536 tokens.
    ///
    /// Args:
    ///     text: a text, or one as the bytes of its UTF-8.
    ///     allowed_special, disallowed_special: as in `encode`.
    ///     threads: that encode a large text; default: one a core. Ids never depend on it.
    #[pyo3(signature = (text, *, allowed_special=SpecialSet::NONE, disallowed_special=SpecialSet::NONE, threads=None), text_signature = "($self, text, *, allowed_special=(), disallowed_special=(), threads=None)")]
    fn encode_to_numpy<'py>(
        &self,
        py: Python<'py>,
        text: TextArgument<'_>,
        allowed_special: SpecialSet,
        disallowed_special: SpecialSet,
        threads: Option<usize>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let text = match &text {
            TextArgument::Text(text) => text_of(text)?,
            TextArgument::Bytes(bytes) => valid_utf8(bytes.as_bytes()).or_raise(py)?,
        };
        let threads = threads_or_default(py, threads)?;
        let (allowed, disallowed) = (allowed_special.allowed(), disallowed_special.allowed());
        Ok(match Dtype::for_vocab(self.encoder.vocab().len()) {
            Dtype::Uint16 => self.array::<u16>(py, text, allowed, disallowed, threads)?.into_any(),
            Dtype::Uint32 => self.array::<u32>(py, text, allowed, disallowed, threads)?.into_any(),
        })
    }

    /// Ids of bytes that need not be UTF-8.
    ///
    /// Args:
    ///     data: the bytes.
    ///     errors: "error" refuses invalid UTF-8 with its offset, "replace" encodes U+FFFD, "bytes" keeps the bytes
    ///         (so that `decode_bytes` brings them back).
    ///     allowed_special: as in `encode`.
    #[pyo3(signature = (data, *, errors="error", allowed_special=SpecialSet::NONE), text_signature = "($self, data, *, errors='error', allowed_special=())")]
    fn encode_bytes(
        &self,
        py: Python<'_>,
        data: &[u8],
        errors: &str,
        allowed_special: SpecialSet,
    ) -> PyResult<Vec<TokenId>> {
        let mut ids = Vec::new();
        let encoded = TextPolicy::from_name(errors)
            .and_then(|policy| self.encoder.encode_bytes(data, policy, allowed_special.allowed(), &mut ids));
        encoded.or_raise(py).map(|()| ids)
    }

    /// `encode` of every text, on several threads where that pays.
    #[pyo3(signature = (texts, *, allowed_special=SpecialSet::NONE, disallowed_special=SpecialSet::NONE, threads=None), text_signature = "($self, texts, *, allowed_special=(), disallowed_special=(), threads=None)")]
    fn encode_batch(
        &self,
        py: Python<'_>,
        texts: Vec<Bound<'_, PyString>>,
        allowed_special: SpecialSet,
        disallowed_special: SpecialSet,
        threads: Option<usize>,
    ) -> PyResult<Vec<Vec<TokenId>>> {
        let texts = texts.iter().map(text_of).collect::<PyResult<Vec<_>>>()?;
        let threads = threads_or_default(py, threads)?;
        let (allowed, disallowed) = (allowed_special.allowed(), disallowed_special.allowed());
        let batch = || {
            for text in &texts {
                self.encoder.refuse(text, disallowed, allowed)?;
            }
            self.encoder.encode_batch(&texts, allowed, threads)
        };
        py.detach(batch).or_raise(py)
    }

    /// Ids of a text that arrives in parts, equal to `encode` of the parts joined; lazy, in bounded memory.
    ///
    /// What cannot be decided yet is held back: text behind the last certain border between pre-tokens. With a
    /// pattern of the user's no border is certain but the ends of allowed special tokens.
    #[pyo3(signature = (chunks, *, allowed_special=SpecialSet::NONE), text_signature = "($self, chunks, *, allowed_special=())")]
    fn encode_iter(
        &self,
        py: Python<'_>,
        chunks: &Bound<'_, PyAny>,
        allowed_special: SpecialSet,
    ) -> PyResult<TokenIterator> {
        let stream = self.encoder.clone().stream(allowed_special.allowed()).or_raise(py)?;
        let chunks = Some(PyIterator::from_object(chunks)?.unbind());
        Ok(TokenIterator { chunks, stream, ready: Vec::new().into_iter() })
    }

    /// The pieces of `text` inside which merges happen; special tokens count as text.
    fn pretokenize(&self, text: &Bound<'_, PyString>) -> PyResult<Vec<String>> {
        let (py, text) = (text.py(), text_of(text)?);
        self.encoder.pretokenize(text).or_raise(py)
    }

    /// Text of `ids` (a sequence, or an array of integers).
    ///
    /// Args:
    ///     ids: token ids.
    ///     errors: bytes that are not UTF-8: "replace" by U+FFFD, "ignore", or "strict" (TextError).
    ///     skip_special_tokens: leave special tokens out.
    ///
    /// Raises:
    ///     ConfigError: an id that is not in the vocabulary, with its place.
    #[pyo3(signature = (ids, *, errors="replace", skip_special_tokens=false))]
    fn decode(
        &self,
        py: Python<'_>,
        ids: &Bound<'_, PyAny>,
        errors: &str,
        skip_special_tokens: bool,
    ) -> PyResult<String> {
        let bytes = self.bytes_of(ids, skip_special_tokens)?;
        match errors {
            "replace" => Ok(String::from_utf8_lossy(&bytes).into_owned()),
            "ignore" => Ok(bytes.utf8_chunks().map(|chunk| chunk.valid()).collect()),
            "strict" => String::from_utf8(bytes).map_err(|e| {
                let at = e.utf8_error().valid_up_to();
                let what =
                    format!("decoded byte {at}: invalid UTF-8; expected text, or decode_bytes or errors=\"replace\"");
                to_python(py, &Error::Text(what))
            }),
            _ => {
                let what = format!("errors: found {errors:?}; expected strict, replace or ignore");
                Err(to_python(py, &Error::Config(what)))
            }
        }
    }

    /// Bytes of `ids`; `decode_bytes(encode(text)) == text.encode()`.
    #[pyo3(signature = (ids, *, skip_special_tokens=false))]
    fn decode_bytes<'py>(&self, ids: &Bound<'py, PyAny>, skip_special_tokens: bool) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(ids.py(), &self.bytes_of(ids, skip_special_tokens)?))
    }

    /// Id of a token by its bytes or text, a special token by its text; None if there is none.
    fn token_to_id(&self, token: &Bound<'_, PyAny>) -> PyResult<Option<TokenId>> {
        let vocab = self.encoder.vocab();
        if let Ok(bytes) = token.extract::<&[u8]>() {
            return Ok(vocab.id_of(bytes));
        }
        let text: String = token.extract()?;
        let special = vocab.specials().iter().find(|special| special.0 == text).map(|special| special.1);
        Ok(special.or_else(|| vocab.id_of(text.as_bytes())))
    }

    /// Bytes of a token.
    fn id_to_token<'py>(&self, py: Python<'py>, id: i64) -> PyResult<Bound<'py, PyBytes>> {
        let bytes = TokenId::try_from(id).ok().and_then(|id| self.encoder.vocab().token(id));
        let size = self.n_vocab();
        let missing = || Error::Config(format!("id {id}: found no such token; expected 0 to {}", size - 1));
        bytes.map(|bytes| PyBytes::new(py, bytes)).ok_or_else(missing).or_raise(py)
    }

    fn __len__(&self) -> usize {
        self.n_vocab()
    }

    fn __repr__(&self) -> String {
        format!("<bytekiln.Tokenizer {} tokens, pattern {}>", self.n_vocab(), self.pattern())
    }

    fn __eq__(&self, other: &Bound<'_, PyAny>) -> bool {
        other.cast::<Self>().is_ok_and(|other| other.get().hash() == self.hash())
    }

    fn __hash__(&self) -> u64 {
        self.hash().bytes().rev().take(16).fold(0, |hash, digit| hash << 4 | u64::from(digit & 15))
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyAny>, (String,))> {
        let load = py.get_type::<Self>().getattr("from_json")?;
        Ok((load, (self.to_json(py)?,)))
    }

    fn __copy__(&self) -> Self {
        Self { encoder: self.encoder.clone() }
    }

    fn __deepcopy__(&self, _memo: &Bound<'_, PyAny>) -> Self {
        self.__copy__()
    }
}

impl Tokenizer {
    fn bytes_of(&self, ids: &Bound<'_, PyAny>, skip_special: bool) -> PyResult<Vec<u8>> {
        let py = ids.py();
        let ids = ids_of(ids)?;
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        self.encoder.decode(&ids, skip_special, &mut bytes).or_raise(py)?;
        Ok(bytes)
    }
}

/// Ids from a sequence of integers or any buffer of them.
fn ids_of(ids: &Bound<'_, PyAny>) -> PyResult<Vec<TokenId>> {
    fn buffer<T: Element + Copy + Into<i64>>(ids: &Bound<'_, PyAny>) -> Option<Vec<i64>> {
        let buffer = PyBuffer::<T>::get(ids).ok()?;
        // Other shapes and byte orders go the way of sequences, which refuses or reads them.
        if buffer.dimensions() != 1 || buffer.format().to_bytes().starts_with(b">") {
            return None;
        }
        let values = buffer.to_vec(ids.py()).ok()?;
        Some(values.into_iter().map(Into::into).collect())
    }
    let values = if ids.cast::<PyList>().is_ok() { None } else { buffer::<u16>(ids) };
    let values = values.or_else(|| buffer::<u32>(ids)).or_else(|| buffer::<i64>(ids)).or_else(|| buffer::<i32>(ids));
    let values = values.map_or_else(|| ids.extract::<Vec<i64>>(), Ok).map_err(|error| {
        if !error.is_instance_of::<PyOverflowError>(ids.py()) {
            return error;
        }
        let what = "ids: found a number beyond 64 bits; expected ids below the vocabulary's size".into();
        to_python(ids.py(), &Error::Config(what))
    })?;
    let narrow = |(place, id): (usize, i64)| {
        TokenId::try_from(id).map_err(|_| {
            let what = format!("ids[{place}]: found {id}; expected ids from 0 up to the vocabulary's size");
            to_python(ids.py(), &Error::Config(what))
        })
    };
    values.into_iter().enumerate().map(narrow).collect()
}

/// Ids of a text that arrives in parts, one at a time.
#[pyclass(module = "bytekiln._core")]
pub struct TokenIterator {
    chunks: Option<Py<PyIterator>>,
    stream: EncodeStream,
    ready: std::vec::IntoIter<TokenId>,
}

#[pymethods]
impl TokenIterator {
    fn __iter__(this: PyRef<'_, Self>) -> PyRef<'_, Self> {
        this
    }

    fn __next__(&mut self, py: Python<'_>) -> PyResult<Option<TokenId>> {
        loop {
            if let Some(id) = self.ready.next() {
                return Ok(Some(id));
            }
            let Some(chunks) = &self.chunks else { return Ok(None) };
            let mut ids = Vec::new();
            if let Some(chunk) = chunks.bind(py).clone().next() {
                // An error of the source is the end: what was held back is not the end of a text.
                let chunk = chunk.inspect_err(|_| self.chunks = None)?.cast_into::<PyString>()?;
                self.stream.push(text_of(&chunk)?, &mut ids).or_raise(py)?;
            } else {
                self.chunks = None;
                self.stream.finish(&mut ids).or_raise(py)?;
            }
            self.ready = ids.into_iter();
        }
    }
}
