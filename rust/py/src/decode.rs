//! Ids of Python's → its `bytes` and `str`.

use std::mem::MaybeUninit;
use std::slice;

use bytekiln_bpe::Error;
use bytekiln_bpe::encode::{Decoding, Encoder, Ids};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString};

use crate::error::{OrRaise, to_python};
use crate::ids::ids_of;
use crate::threads_or_default;

/// Fewer ids than this are decoded without releasing the interpreter: handing it over costs more.
const FEW: usize = 4096;

/// The bytes of `ids`, written where Python has them.
pub fn bytes_of<'py>(encoder: &Encoder, ids: &Bound<'py, PyAny>, skip_special: bool) -> PyResult<Bound<'py, PyBytes>> {
    let py = ids.py();
    let ids = ids_of(ids)?;
    let decoding = counted(py, encoder, &*ids, skip_special)?;
    let len = decoding.len();
    // SAFETY: of `len` bytes, or null where an exception is set; Python fills nothing in where it is given nothing.
    let bytes = unsafe { ffi::PyBytes_FromStringAndSize(std::ptr::null(), len.cast_signed()) };
    // SAFETY: as above, and new.
    let bytes = unsafe { Bound::from_owned_ptr_or_err(py, bytes) }?.cast_into::<PyBytes>()?;
    // SAFETY: a bytes object, which has `len` bytes; nobody but this function knows it yet.
    let room =
        unsafe { slice::from_raw_parts_mut(ffi::PyBytes_AsString(bytes.as_ptr()).cast::<MaybeUninit<u8>>(), len) };
    if ids.len() < FEW { decoding.write(room) } else { py.detach(|| decoding.write(room)) }.or_raise(py)?;
    Ok(bytes)
}

/// The text of `ids`.
pub fn text_of_ids<'py>(
    encoder: &Encoder,
    ids: &Bound<'py, PyAny>,
    errors: &str,
    skip_special: bool,
) -> PyResult<Bound<'py, PyString>> {
    let py = ids.py();
    let policy = match errors {
        "strict" => c"strict",
        "replace" => c"replace",
        "ignore" => c"ignore",
        _ => {
            let what = format!("errors: found {errors:?}; expected strict, replace or ignore");
            return Err(to_python(py, &Error::Config(what)));
        }
    };
    let ids = ids_of(ids)?;
    let decoding = counted(py, encoder, &*ids, skip_special)?;
    let append = || {
        let mut bytes = Vec::new();
        decoding.append(&mut bytes).map(|()| bytes)
    };
    let bytes = if ids.len() < FEW { append() } else { py.detach(append) }.or_raise(py)?;
    let len = bytes.len().cast_signed();
    // SAFETY: `bytes` are `len` bytes, the policy's name ends in a zero. Python checks and copies in one pass.
    let text = unsafe { ffi::PyUnicode_DecodeUTF8(bytes.as_ptr().cast(), len, policy.as_ptr()) };
    // SAFETY: a new string, or null where an exception is set.
    let text = unsafe { Bound::from_owned_ptr_or_err(py, text) };
    match (text, std::str::from_utf8) {
        (Ok(text), _) => Ok(text.cast_into()?),
        (Err(error), check) => Err(match check(&bytes) {
            Err(found) if policy == c"strict" => {
                let at = found.valid_up_to();
                let what =
                    format!("decoded byte {at}: invalid UTF-8; expected text, or decode_bytes or errors=\"replace\"");
                to_python(py, &Error::Text(what))
            }
            _ => error,
        }),
    }
}

fn counted<'a>(py: Python<'_>, encoder: &'a Encoder, ids: &'a dyn Ids, skip_special: bool) -> PyResult<Decoding<'a>> {
    if ids.len() < FEW {
        return encoder.decoding(ids, skip_special, 1).or_raise(py);
    }
    let threads = threads_or_default(py, None)?;
    py.detach(|| encoder.decoding(ids, skip_special, threads)).or_raise(py)
}
