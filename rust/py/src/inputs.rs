//! What describes an input changes language: paths, or an object with the fields of `bytekiln.inputs.Inputs`.
//! Parquet is read by `bytekiln.parquet`, whose columns the core takes as a [`Feed`].

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytekiln_bpe::sources::{Feed, InputSpec, OpenFeed};
use bytekiln_bpe::{Error, Result};
use pyo3::exceptions::{PyOverflowError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

/// An input as the core takes it.
pub struct Spec(pub InputSpec);

/// One path or several.
pub struct Paths(pub Vec<PathBuf>);

impl<'py> FromPyObject<'_, 'py> for Paths {
    type Error = PyErr;

    fn extract(value: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        // Python code runs in between: what it raises besides, an interrupt for instance, is no matter of types.
        let of_type = |error: &PyErr| error.is_instance_of::<PyTypeError>(value.py());
        match value.extract() {
            Ok(path) => return Ok(Self(vec![path])),
            Err(error) if !of_type(&error) => return Err(error),
            Err(_) => {}
        }
        let wrong = || -> PyErr {
            let found = value.get_type().name().map_or_else(|_| "something else".into(), |name| name.to_string());
            PyTypeError::new_err(format!("paths: found {found}; expected a path, or several paths"))
        };
        let items = value.try_iter().map_err(|error| if of_type(&error) { wrong() } else { error })?;
        let path = |item: PyResult<Bound<'py, PyAny>>| {
            item?.extract().map_err(|error: PyErr| if of_type(&error) { wrong() } else { error })
        };
        Ok(Self(items.map(path).collect::<PyResult<_>>()?))
    }
}

/// A field of an `Inputs`; what Python code raises on the way is passed on, a wrong value is named.
fn field<'py, T>(value: Borrowed<'_, 'py, PyAny>, name: &str, expected: &str) -> PyResult<T>
where
    T: for<'a> FromPyObject<'a, 'py, Error = PyErr>,
{
    let found = value.getattr(name)?;
    found.extract().map_err(|error: PyErr| {
        let py = value.py();
        if error.is_instance_of::<PyTypeError>(py) || error.is_instance_of::<PyOverflowError>(py) {
            let found = found.repr().map_or_else(|_| "another".into(), |text| text.to_string());
            PyTypeError::new_err(format!("{name}: found {found}; expected {expected}"))
        } else {
            error
        }
    })
}

impl<'py> FromPyObject<'_, 'py> for Spec {
    type Error = PyErr;

    fn extract(value: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let open_feed: Option<Arc<OpenFeed>> = Some(Arc::new(open_column));
        if !value.hasattr("limit_bytes")? {
            return Ok(Self(InputSpec { open_feed, ..InputSpec::of(&value.extract::<Paths>()?.0) }));
        }
        Ok(Self(InputSpec {
            paths: value.getattr("paths")?.extract::<Paths>()?.0,
            field: field(value, "field", "a text or None")?,
            limit_bytes: field(value, "limit_bytes", "a number of bytes, 1 or more, or None")?,
            sample: field(value, "sample", "a share above 0 and at most 1, or None")?,
            seed: field(value, "seed", "a whole number from 0, below 2^64")?,
            open_feed,
        }))
    }
}

fn open_column(path: &Path, field: &str) -> Result<Box<dyn Feed>> {
    let open = |py: Python<'_>| -> PyResult<Parquet> {
        let path = path.to_string_lossy();
        let column = py.import("bytekiln.parquet")?.getattr("Column")?.call1((path, field))?;
        let rows = column.getattr("num_rows")?.extract()?;
        Ok(Parquet { column: column.unbind(), rows, seen: 0 })
    };
    Ok(Box::new(Python::attach(open).map_err(called)?))
}

fn called(error: PyErr) -> Error {
    Error::Called(Box::new(error))
}

/// A `bytekiln.parquet.Column`.
struct Parquet {
    column: Py<PyAny>,
    rows: u64,
    seen: u64,
}

impl Feed for Parquet {
    fn next(&mut self, most: usize, take: &mut dyn FnMut(&[u8]) -> bool) -> Result<bool> {
        // pyarrow lets the interpreter go while it unpacks.
        let next = |py: Python<'_>| -> PyResult<Option<(Py<PyBytes>, Py<PyBytes>)>> {
            self.column.bind(py).call_method1("next", (most,))?.extract()
        };
        let Some((borders, texts)) = Python::attach(next).map_err(called)? else { return Ok(false) };
        let hand_over = |py: Python<'_>| -> PyResult<u64> {
            let (borders, texts) = (borders.bind(py).as_bytes(), texts.bind(py).as_bytes());
            let border = |b: &[u8]| b.try_into().ok().and_then(|b| usize::try_from(i64::from_le_bytes(b)).ok());
            let mut start = None;
            let mut rows = 0;
            for end in borders.chunks_exact(8).map(border) {
                if let Some(start) = start {
                    let text = end.and_then(|end| texts.get(start..end));
                    let text = text.ok_or_else(|| PyValueError::new_err("parquet: borders outside of the texts"))?;
                    rows += 1;
                    if !take(text) {
                        break;
                    }
                }
                start = end;
            }
            Ok(rows)
        };
        self.seen += Python::attach(hand_over).map_err(called)?;
        Ok(true)
    }

    #[expect(clippy::cast_precision_loss, reason = "for a progress bar")]
    fn share_done(&self) -> f64 {
        if self.rows == 0 { 1.0 } else { self.seen as f64 / self.rows as f64 }
    }
}
