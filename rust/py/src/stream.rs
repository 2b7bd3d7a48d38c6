//! `Tokenizer.encode_iter`'s iterator.

use bytekiln_bpe::disallowed::Disallowed;
use bytekiln_bpe::encode::EncodeStream;
use bytekiln_bpe::train::TokenId;
use pyo3::prelude::*;
use pyo3::types::{PyIterator, PyString};

use crate::arguments::text_of;
use crate::error::OrRaise;

/// Ids of a text that arrives in parts, one at a time.
#[pyclass(module = "bytekiln._core")]
pub struct TokenIterator {
    chunks: Option<Py<PyIterator>>,
    stream: EncodeStream,
    disallowed: Disallowed,
    ready: std::vec::IntoIter<TokenId>,
}

impl TokenIterator {
    /// Nothing is read before an id is asked for.
    pub fn new(chunks: &Bound<'_, PyAny>, stream: EncodeStream, disallowed: Disallowed) -> PyResult<Self> {
        let chunks = Some(PyIterator::from_object(chunks)?.unbind());
        Ok(Self { chunks, stream, disallowed, ready: Vec::new().into_iter() })
    }
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
                let text = text_of(&chunk)?;
                let pushed = self.disallowed.push(text).and_then(|()| self.stream.push(text, &mut ids));
                pushed.or_raise(py).inspect_err(|_| self.chunks = None)?;
            } else {
                self.chunks = None;
                self.stream.finish(&mut ids).or_raise(py)?;
            }
            self.ready = ids.into_iter();
        }
    }
}
