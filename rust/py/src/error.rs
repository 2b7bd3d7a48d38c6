//! The one place where errors change language: [`Error`] becomes a class of `bytekiln.errors`.

use bytekiln_bpe::Error;
use pyo3::exceptions::{PyKeyboardInterrupt, PyMemoryError};
use pyo3::prelude::*;

/// The Python exception of an error of the core.
pub fn to_python(py: Python<'_>, error: &Error) -> PyErr {
    let class = match error {
        Error::File { .. } => "FileError",
        Error::Exists(_) => "OutputExistsError",
        Error::Text(_) => "TextError",
        Error::Format { .. } => "FormatError",
        Error::Config(_) => "ConfigError",
        Error::Memory(what) => return PyMemoryError::new_err(what.clone()),
        Error::Called(own) => match own.downcast_ref::<PyErr>() {
            Some(own) => return own.clone_ref(py),
            None => "FileError",
        },
        Error::Interrupted => return PyKeyboardInterrupt::new_err(()),
    };
    let made = py.import("bytekiln.errors").and_then(|m| m.getattr(class)).and_then(|c| c.call1((error.to_string(),)));
    match made {
        Ok(exception) => PyErr::from_value(exception),
        Err(failure) => failure,
    }
}

/// `?` for results of the core.
pub trait OrRaise<T> {
    /// The value, or the Python exception.
    fn or_raise(self, py: Python<'_>) -> PyResult<T>;
}

impl<T> OrRaise<T> for bytekiln_bpe::Result<T> {
    fn or_raise(self, py: Python<'_>) -> PyResult<T> {
        self.map_err(|error| to_python(py, &error))
    }
}
