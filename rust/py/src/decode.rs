//! Ids of Python's → its `bytes` and `str`.

use std::mem::MaybeUninit;
use std::slice;

use bytekiln_bpe::Error;
use bytekiln_bpe::encode::{Decoding, Encoder, Ids};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString};

use crate::error::{OrRaise, to_python};
use crate::ids::{Items, ids_of};
use crate::threads_or_default;

/// Fewer ids than this are decoded without releasing the interpreter: handing it over costs more.
const FEW: usize = 4096;

/// The bytes of `ids`, written where Python has them.
pub fn bytes_of<'py>(encoder: &Encoder, ids: &Bound<'py, PyAny>, skip_special: bool) -> PyResult<Bound<'py, PyBytes>> {
    let py = ids.py();
    let items = Items::of(ids, FEW);
    if let Some(decoding) = counted_attached(py, encoder, items.as_ref(), skip_special)? {
        return filled(py, decoding.len(), |room| decoding.write(room));
    }
    let ids = ids_of(ids)?;
    let decoding = counted(py, encoder, &*ids, skip_special)?;
    filled(
        py,
        decoding.len(),
        |room| {
            if ids.len() < FEW { decoding.write(room) } else { py.detach(|| decoding.write(room)) }
        },
    )
}

/// A bytes object of `len` bytes, all of which `write` writes.
fn filled(
    py: Python<'_>,
    len: usize,
    write: impl FnOnce(&mut [MaybeUninit<u8>]) -> Result<(), Error>,
) -> PyResult<Bound<'_, PyBytes>> {
    // SAFETY: of `len` bytes, or null where an exception is set; Python fills nothing in where it is given nothing.
    let bytes = unsafe { ffi::PyBytes_FromStringAndSize(std::ptr::null(), len.cast_signed()) };
    // SAFETY: as above, and new.
    let bytes = unsafe { Bound::from_owned_ptr_or_err(py, bytes) }?.cast_into::<PyBytes>()?;
    // SAFETY: a bytes object, which has `len` bytes; nobody but this function knows it yet.
    let room =
        unsafe { slice::from_raw_parts_mut(ffi::PyBytes_AsString(bytes.as_ptr()).cast::<MaybeUninit<u8>>(), len) };
    write(room).or_raise(py)?;
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
    let (items, mut bytes) = (Items::of(ids, FEW), Vec::new());
    if let Some(decoding) = counted_attached(py, encoder, items.as_ref(), skip_special)? {
        decoding.append(&mut bytes).or_raise(py)?;
    } else {
        let ids = ids_of(ids)?;
        let decoding = counted(py, encoder, &*ids, skip_special)?;
        let mut append = || decoding.append(&mut bytes);
        if ids.len() < FEW { append() } else { py.detach(append) }.or_raise(py)?;
    }
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

/// Counts where the ids lie in a list, while the interpreter waits, and so it does while they are written. A copy of 100 million
/// is 400 MB of fresh memory, which costs more than to read the list twice; but it would let others run after half of the time.
/// None where there is no list, or something in it is no plain int that is a token's id: [`ids_of`] has other ways to read
/// it, and [`counted`] tells what is the matter.
fn counted_attached<'a>(
    py: Python<'_>,
    encoder: &'a Encoder,
    items: Option<&'a Items<'_>>,
    skip_special: bool,
) -> PyResult<Option<Decoding<'a>>> {
    let Some(items) = items else { return Ok(None) };
    let threads = threads_or_default(py, None)?;
    Ok(encoder.decoding(items, skip_special, threads).ok())
}

fn counted<'a>(py: Python<'_>, encoder: &'a Encoder, ids: &'a dyn Ids, skip_special: bool) -> PyResult<Decoding<'a>> {
    if ids.len() < FEW {
        return encoder.decoding(ids, skip_special, 1).or_raise(py);
    }
    let threads = threads_or_default(py, None)?;
    py.detach(|| encoder.decoding(ids, skip_special, threads)).or_raise(py)
}
