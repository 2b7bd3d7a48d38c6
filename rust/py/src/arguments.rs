//! Arguments of `Tokenizer`'s methods: what Python gives, as the core takes it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use bytekiln_bpe::Error;
use bytekiln_bpe::encode::Allowed;
use bytekiln_bpe::formats::SpecialNames;
use bytekiln_bpe::train::TokenId;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyIterator, PyMemoryView, PyString};

use crate::error::to_python;

/// `"all"` or names of special tokens.
pub enum SpecialSet {
    All,
    Names(Vec<String>),
}

impl SpecialSet {
    /// The set as the core takes it.
    pub fn allowed(&self) -> Allowed<'_> {
        match self {
            Self::All => Allowed::All,
            Self::Names(names) if names.is_empty() => Allowed::None,
            Self::Names(names) => Allowed::Only(names),
        }
    }

    /// No special token.
    pub const NONE: Self = Self::Names(Vec::new());
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
    /// Texts with their ids, where they have them.
    pub fn names(self) -> PyResult<SpecialNames> {
        match self {
            Self::Texts(texts) => Ok(texts.into_iter().map(|text| (text, None)).collect()),
            Self::Ids(ids) => ids.iter().map(|(text, id)| Ok((text.extract()?, Some(id.extract()?)))).collect(),
        }
    }
}

/// A vocabulary: a file, or tokens by id.
#[derive(FromPyObject)]
pub enum TextArgument<'py> {
    Text(Bound<'py, PyString>),
    Bytes(Bound<'py, PyBytes>),
}

impl TextArgument<'_> {
    /// UTF-8, if bytes are that.
    pub fn bytes(&self) -> PyResult<&[u8]> {
        Ok(match self {
            Self::Text(text) => text_of(text)?.as_bytes(),
            Self::Bytes(bytes) => bytes.as_bytes(),
        })
    }
}

#[derive(FromPyObject)]
pub enum VocabArgument {
    Path(PathBuf),
    Tokens(BTreeMap<TokenId, Vec<u8>>),
}

/// Merges: a file, or pairs in order.
#[derive(FromPyObject)]
pub enum MergesArgument {
    Path(PathBuf),
    Pairs(Vec<(Vec<u8>, Vec<u8>)>),
}

/// Text of a Python string; a lone surrogate is not text.
pub fn text_of<'a>(text: &'a Bound<'_, PyString>) -> PyResult<&'a str> {
    text.to_str().map_err(|e| {
        let what = format!("text: {}; expected a string without lone surrogates", e.value(text.py()));
        to_python(text.py(), &Error::Text(what))
    })
}

/// Ids as a list of Python's.
pub struct IdList(pub Vec<TokenId>);

impl<'py> IntoPyObject<'py> for IdList {
    type Target = PyAny;
    type Output = Bound<'py, PyAny>;
    type Error = PyErr;

    fn into_pyobject(self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        if self.0.len() < LONG_LIST {
            return Ok(self.0.into_pyobject(py)?.into_any());
        }
        // Where Python has no memory for a number, pyo3's own way ends in a panic, and Python's in a MemoryError.
        let bytes = PyBytes::new_with(py, 4 * self.0.len(), |room| {
            for (place, id) in room.as_chunks_mut().0.iter_mut().zip(&self.0) {
                *place = id.to_ne_bytes();
            }
            Ok(())
        })?;
        PyMemoryView::from(&bytes)?.call_method1("cast", ("I",))?.call_method0("tolist")
    }
}

/// Ids of a list that may be too long for the memory that is left.
const LONG_LIST: usize = 1 << 14;
