//! `bytekiln.Tokenizer`: the encoder as a frozen Python class. Texts and documentation are in `_core.pyi`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use bytekiln_bpe::Error;
use bytekiln_bpe::disallowed::Disallowed;
use bytekiln_bpe::encode::{Allowed, Encoder, Out};
use bytekiln_bpe::formats::{self, Format};
use bytekiln_bpe::offsets::offsets;
use bytekiln_bpe::pretokenize::TextPolicy;
use bytekiln_bpe::tokens::Dtype;
use bytekiln_bpe::train::TokenId;
use bytekiln_bpe::vocab::Vocab;
use numpy::PyArray1;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyBytes, PyDict, PyString, PyTuple};

use crate::arguments::{IdList, MergesArgument, SpecialArgument, SpecialSet, TextArgument, VocabArgument, text_of};
use crate::decode::{bytes_of, text_of_ids};
use crate::error::OrRaise;
use crate::stream::TokenIterator;
use crate::threads_or_default;

/// Text shorter than this is encoded without releasing the interpreter: handing it over costs more.
const SHORT_TEXT: usize = 4096;

/// A byte-level BPE tokenizer: encodes, decodes, saves.
#[pyclass(frozen, module = "bytekiln._core", name = "Tokenizer")]
pub struct Tokenizer {
    pub encoder: Arc<Encoder>,
}

impl Tokenizer {
    pub fn from_vocab(py: Python<'_>, vocab: bytekiln_bpe::Result<Vocab>) -> PyResult<Self> {
        let encoder = vocab.and_then(Encoder::new).or_raise(py)?;
        Ok(Self { encoder: Arc::new(encoder) })
    }

    fn ids(&self, text: &Bound<'_, PyString>, allowed: &SpecialSet, disallowed: &SpecialSet) -> PyResult<Vec<TokenId>> {
        let (py, text) = (text.py(), text_of(text)?);
        let (allowed, disallowed) = (allowed.allowed(), disallowed.allowed());
        let work = || {
            let mut ids = Vec::new();
            // Of most texts as much as they take; where there is not so much, less may do.
            let _ = ids.try_reserve(text.len() / 3 + 8);
            Disallowed::new(self.encoder.vocab(), disallowed, allowed)?.refuse(text.as_bytes())?;
            self.encoder.encode(text, allowed, &mut ids).map(|()| ids)
        };
        if text.len() < SHORT_TEXT { work() } else { py.detach(work) }.or_raise(py)
    }
}

impl Tokenizer {
    fn array<'py, T: numpy::Element + Copy + Sync>(
        &self,
        py: Python<'py>,
        text: &[u8],
        allowed: Allowed<'_>,
        disallowed: Allowed<'_>,
        threads: usize,
    ) -> PyResult<Bound<'py, PyArray1<T>>>
    where
        Vec<T>: Out,
    {
        let encoded = py.detach(|| {
            Disallowed::new(self.encoder.vocab(), disallowed, allowed)?.refuse(text)?;
            let mut ids = Vec::new();
            self.encoder.encode_on_threads(text, allowed, threads, &mut ids).map(|()| ids)
        });
        encoded.or_raise(py).map(|ids| PyArray1::from_vec(py, ids))
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
        Self::from_vocab(py, formats::read(&path, specials.as_ref(), pattern))
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
                formats::read_vocab_and_merges(&vocab, &merges, specials.as_ref(), pattern)
            }
            (VocabArgument::Tokens(tokens), MergesArgument::Pairs(pairs)) => {
                let tokens: Vec<_> = tokens.into_iter().map(|(id, bytes)| (bytes, id)).collect();
                formats::from_parts(&tokens, &pairs, specials.as_ref(), pattern)
            }
            _ => return Err(PyTypeError::new_err("vocab and merges: expected two paths, or a dict and a list")),
        };
        Self::from_vocab(py, vocab)
    }

    /// Build a tokenizer that encodes as `tiktoken.Encoding` does with the same ranks, pattern and special tokens.
    ///
    /// Args:
    ///     ranks: every ordinary token with its id, which is its priority, too.
    ///     pattern: gpt2, cl100k, o200k or a regular expression.
    ///     special_tokens: texts with ids (behind the ranks they may leave ids free), or texts.
    ///
    /// Raises:
    ///     ConfigError.
    #[staticmethod]
    #[pyo3(signature = (ranks, *, pattern, special_tokens=None))]
    fn from_ranks(
        py: Python<'_>,
        ranks: BTreeMap<Vec<u8>, TokenId>,
        pattern: &str,
        special_tokens: Option<SpecialArgument<'_>>,
    ) -> PyResult<Self> {
        let specials = special_tokens.map(SpecialArgument::names).transpose()?;
        let ranks: Vec<_> = ranks.into_iter().collect();
        Self::from_vocab(py, formats::from_ranks(&ranks, specials.as_ref(), pattern))
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
    /// (a folder with GPT-2's `vocab.json` and `merges.txt`), `tiktoken` (ranks; no pattern, no special tokens) or
    /// `pretrained` (the folder of `save_pretrained`).
    ///
    /// Raises:
    ///     OutputExistsError: it exists and `overwrite` is false.
    ///     FileError: the folder is missing or cannot be written.
    #[pyo3(signature = (path, *, format="tokenizer.json", overwrite=false))]
    fn save(&self, py: Python<'_>, path: PathBuf, format: &str, overwrite: bool) -> PyResult<()> {
        let saved = Format::from_name(format).and_then(|f| formats::write(self.encoder.vocab(), &path, f, overwrite));
        saved.or_raise(py)
    }

    /// Write a folder that `transformers.AutoTokenizer.from_pretrained` loads: `tokenizer.json` and `tokenizer_config.json`.
    ///
    /// There as here the ids are the same, decoded text is not cleaned up, and the end-of-text token is the beginning-
    /// and the end-of-sequence token. The folder is made if it is missing.
    ///
    /// Raises:
    ///     OutputExistsError: one of the two exists and `overwrite` is false.
    ///     FileError: the parent folder is missing or cannot be written.
    #[pyo3(signature = (folder, *, overwrite=false))]
    fn save_pretrained(&self, py: Python<'_>, folder: PathBuf, overwrite: bool) -> PyResult<()> {
        formats::write(self.encoder.vocab(), &folder, Format::Pretrained, overwrite).or_raise(py)
    }

    /// Every token's bytes by id; a special token's are those of its text.
    #[getter]
    fn vocab<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for id in 0..self.encoder.vocab().len() as TokenId {
            if let Some(token) = self.encoder.vocab().token(id) {
                dict.set_item(id, PyBytes::new(py, token))?;
            }
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

    /// Number of ids, special tokens' included; ids are 0 up to this. As in tiktoken, some between special tokens may be
    /// nobody's.
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
    ///     disallowed_special: texts that are an error, or "all" (tiktoken's default): all special tokens that are not
    ///         allowed.
    ///
    /// Raises:
    ///     TextError: a disallowed special token, with its byte offset.
    #[pyo3(signature = (text, *, allowed_special=SpecialSet::NONE, disallowed_special=SpecialSet::NONE), text_signature = "($self, text, *, allowed_special=(), disallowed_special=())")]
    fn encode(
        &self,
        text: &Bound<'_, PyString>,
        allowed_special: SpecialSet,
        disallowed_special: SpecialSet,
    ) -> PyResult<IdList> {
        self.ids(text, &allowed_special, &disallowed_special).map(IdList)
    }

    /// `encode` with every special token taken as text.
    fn encode_ordinary(&self, text: &Bound<'_, PyString>) -> PyResult<IdList> {
        self.ids(text, &SpecialSet::NONE, &SpecialSet::NONE).map(IdList)
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
        let text = text.bytes()?;
        let threads = threads_or_default(py, threads)?;
        let (allowed, disallowed) = (allowed_special.allowed(), disallowed_special.allowed());
        Ok(match Dtype::for_vocab(self.encoder.vocab().len()) {
            Dtype::Uint16 => self.array::<u16>(py, text, allowed, disallowed, threads)?.into_any(),
            Dtype::Uint32 => self.array::<u32>(py, text, allowed, disallowed, threads)?.into_any(),
        })
    }

    /// `encode` with the place of every token.
    ///
    /// Returns:
    ///     The ids; their starts and ends in bytes of UTF-8; their starts and ends in characters: two arrays of uint64,
    ///     tokens × 2. `text.encode()[start:end]` is the token, and tokens follow each other without a gap.
    ///     `text[start:end]` are the characters in which its bytes lie, so tokens that are parts of one character all
    ///     have that character's place.
    #[pyo3(signature = (text, *, allowed_special=SpecialSet::NONE, disallowed_special=SpecialSet::NONE), text_signature = "($self, text, *, allowed_special=(), disallowed_special=())")]
    fn encode_with_offsets<'py>(
        &self,
        text: &Bound<'py, PyString>,
        allowed_special: SpecialSet,
        disallowed_special: SpecialSet,
    ) -> PyResult<Bound<'py, PyTuple>> {
        let py = text.py();
        let ids = self.ids(text, &allowed_special, &disallowed_special)?;
        let found = offsets(self.encoder.vocab(), text_of(text)?, &ids).or_raise(py)?;
        let array = |spans: &[[u64; 2]]| {
            let bytes: Vec<u8> = spans.as_flattened().iter().flat_map(|place| place.to_le_bytes()).collect();
            let flat = py.import("numpy")?.call_method1("frombuffer", (PyByteArray::new(py, &bytes), "<u8"))?;
            flat.call_method1("reshape", (spans.len(), 2))
        };
        (ids, array(&found.bytes)?, array(&found.characters)?).into_pyobject(py)
    }

    /// Ids of bytes that need not be UTF-8.
    ///
    /// Args:
    ///     data: the bytes.
    ///     errors: "error" refuses invalid UTF-8 with its offset, "replace" encodes U+FFFD, "bytes" keeps the bytes
    ///         (so that `decode_bytes` brings them back).
    ///     allowed_special, disallowed_special: as in `encode`.
    #[pyo3(signature = (data, *, errors="error", allowed_special=SpecialSet::NONE, disallowed_special=SpecialSet::NONE), text_signature = "($self, data, *, errors='error', allowed_special=(), disallowed_special=())")]
    fn encode_bytes(
        &self,
        py: Python<'_>,
        data: &[u8],
        errors: &str,
        allowed_special: SpecialSet,
        disallowed_special: SpecialSet,
    ) -> PyResult<IdList> {
        let (allowed, disallowed) = (allowed_special.allowed(), disallowed_special.allowed());
        let policy = TextPolicy::from_name(errors).or_raise(py)?;
        let work = || {
            let mut ids = Vec::new();
            Disallowed::new(self.encoder.vocab(), disallowed, allowed)?.refuse(data)?;
            self.encoder.encode_bytes(data, policy, allowed, &mut ids).map(|()| ids)
        };
        if data.len() < SHORT_TEXT { work() } else { py.detach(work) }.or_raise(py).map(IdList)
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
    ) -> PyResult<Vec<IdList>> {
        let texts = texts.iter().map(text_of).collect::<PyResult<Vec<_>>>()?;
        let threads = threads_or_default(py, threads)?;
        let (allowed, disallowed) = (allowed_special.allowed(), disallowed_special.allowed());
        let batch = || {
            let refused = Disallowed::new(self.encoder.vocab(), disallowed, allowed)?;
            texts.iter().try_for_each(|text| refused.refuse(text.as_bytes()))?;
            self.encoder.encode_batch(&texts, allowed, threads)
        };
        py.detach(batch).or_raise(py).map(|lists| lists.into_iter().map(IdList).collect())
    }

    /// Ids of a text that arrives in parts, equal to `encode` of the parts joined; lazy, in bounded memory.
    ///
    /// What cannot be decided yet is held back: text behind the last certain border between pre-tokens. With a
    /// pattern of the user's no border is certain but the ends of allowed special tokens.
    /// A disallowed special token is an error when the part comes that completes it; ids of parts before are out by then.
    #[pyo3(signature = (chunks, *, allowed_special=SpecialSet::NONE, disallowed_special=SpecialSet::NONE), text_signature = "($self, chunks, *, allowed_special=(), disallowed_special=())")]
    fn encode_iter(
        &self,
        py: Python<'_>,
        chunks: &Bound<'_, PyAny>,
        allowed_special: SpecialSet,
        disallowed_special: SpecialSet,
    ) -> PyResult<TokenIterator> {
        let (allowed, disallowed) = (allowed_special.allowed(), disallowed_special.allowed());
        let refused = Disallowed::new(self.encoder.vocab(), disallowed, allowed).or_raise(py)?;
        let stream = self.encoder.clone().stream(allowed).or_raise(py)?;
        TokenIterator::new(chunks, stream, refused)
    }

    /// The pieces of `text` inside which merges happen; special tokens count as text.
    fn pretokenize(&self, text: &Bound<'_, PyString>) -> PyResult<Vec<String>> {
        let (py, text) = (text.py(), text_of(text)?);
        self.encoder.pretokenize(text).or_raise(py)
    }

    /// Text of `ids`.
    ///
    /// Args:
    ///     ids: a sequence of integers, or an array or a buffer of them, which is read where it lies; a tensor.
    ///     errors: bytes that are not UTF-8: "replace" by U+FFFD, "ignore", or "strict" (TextError).
    ///     skip_special_tokens: leave special tokens out.
    ///
    /// Raises:
    ///     ConfigError: an id that is not in the vocabulary, with its place.
    #[pyo3(signature = (ids, *, errors="replace", skip_special_tokens=false))]
    fn decode<'py>(
        &self,
        ids: &Bound<'py, PyAny>,
        errors: &str,
        skip_special_tokens: bool,
    ) -> PyResult<Bound<'py, PyString>> {
        text_of_ids(&self.encoder, ids, errors, skip_special_tokens)
    }

    /// Bytes of `ids`; `decode_bytes(encode(text)) == text.encode()`.
    #[pyo3(signature = (ids, *, skip_special_tokens=false))]
    fn decode_bytes<'py>(&self, ids: &Bound<'py, PyAny>, skip_special_tokens: bool) -> PyResult<Bound<'py, PyBytes>> {
        bytes_of(&self.encoder, ids, skip_special_tokens)
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

    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyTuple>)> {
        let load = |name| py.get_type::<Self>().getattr(name);
        if let Ok(json) = formats::to_json(self.encoder.vocab()) {
            return Ok((load("from_json")?, (json,).into_pyobject(py)?));
        }
        // Ranks that no list of merges explains are all that a tokenizer.json cannot say.
        Ok((
            load("_from_pickled_ranks")?,
            (self.ranks(py)?, self.pattern(), self.special_tokens(py)?).into_pyobject(py)?,
        ))
    }

    #[staticmethod]
    fn _from_pickled_ranks(
        py: Python<'_>,
        ranks: BTreeMap<Vec<u8>, TokenId>,
        pattern: &str,
        special_tokens: SpecialArgument<'_>,
    ) -> PyResult<Self> {
        Self::from_ranks(py, ranks, pattern, Some(special_tokens))
    }

    fn __copy__(&self) -> Self {
        Self { encoder: self.encoder.clone() }
    }

    fn __deepcopy__(&self, _memo: &Bound<'_, PyAny>) -> Self {
        self.__copy__()
    }
}

impl Tokenizer {
    /// Ordinary tokens with their ids.
    fn ranks<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let (dict, vocab) = (PyDict::new(py), self.encoder.vocab());
        for id in (0..vocab.len() as TokenId).filter(|&id| !vocab.is_special(id)) {
            dict.set_item(PyBytes::new(py, vocab.token(id).unwrap_or_default()), id)?;
        }
        Ok(dict)
    }
}
