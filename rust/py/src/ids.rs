//! Ids as Python gives them, read where they lie: arrays and other buffers of whatever width, and lists of plain ints.
//! What else is a sequence of integers is copied number by number.

use std::marker::PhantomData;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicI8, AtomicI16, AtomicI32, AtomicI64, AtomicU8, AtomicU16, AtomicU32, AtomicU64};

use bytekiln_bpe::Error;
use bytekiln_bpe::encode::{Ids, NO_ID, room_for};
use bytekiln_bpe::train::TokenId;
use pyo3::buffer::{Element, ElementType, PyBuffer, PyUntypedBuffer};
use pyo3::exceptions::PyOverflowError;
use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};
use pyo3::{ffi, intern};

use crate::error::{OrRaise, to_python};

/// The ints of a list or a tuple where they lie. What is no plain int, or none of 32 bits, counts as [`NO_ID`]: to tell
/// what it is may take code of Python's, which is for [`ids_of`] to run.
pub struct Items<'a> {
    list: *mut ffi::PyObject,
    get: unsafe extern "C" fn(*mut ffi::PyObject, ffi::Py_ssize_t) -> *mut ffi::PyObject,
    len: usize,
    /// The thread that lends the list stays attached to the interpreter and runs no code of Python's: nothing in it changes.
    attached: PhantomData<Python<'a>>,
}

// SAFETY: others may read the list while `attached` holds: what reads a place of it, and a plain int, counts no references,
// raises nothing and asks for no state of a thread.
unsafe impl Sync for Items<'_> {}

impl<'a> Items<'a> {
    /// None where it is neither, or has fewer than `least`.
    pub fn of(ids: &'a Bound<'_, PyAny>, least: usize) -> Option<Self> {
        let attached = PhantomData;
        let items = if let Ok(list) = ids.cast::<PyList>() {
            Self { list: list.as_ptr(), get: ffi::PyList_GetItem, len: list.len(), attached }
        } else {
            let tuple = ids.cast::<PyTuple>().ok()?;
            Self { list: tuple.as_ptr(), get: ffi::PyTuple_GetItem, len: tuple.len(), attached }
        };
        (items.len >= least).then_some(items)
    }

    /// # Panics
    /// If the place is not in the list.
    #[inline]
    fn at(&self, place: usize) -> Option<TokenId> {
        assert!(place < self.len);
        // SAFETY: a list, or a tuple, of this type's own function, and a place in it: no exception comes of it.
        let item = unsafe { (self.get)(self.list, place.cast_signed()) };
        // SAFETY: the list holds the item.
        if unsafe { ffi::PyLong_CheckExact(item) } == 0 {
            return None;
        }
        let mut overflow = 0;
        // SAFETY: an int, of which neither code nor an exception comes.
        TokenId::try_from(unsafe { ffi::PyLong_AsLongLongAndOverflow(item, &raw mut overflow) }).ok()
    }
}

impl Ids for Items<'_> {
    fn len(&self) -> usize {
        self.len
    }

    fn copy(&self, from: usize, room: &mut [TokenId]) {
        (from..).zip(room).for_each(|(place, id)| *id = self.at(place).unwrap_or(NO_ID));
    }

    fn number(&self, place: usize) -> i128 {
        self.at(place).unwrap_or(NO_ID).into()
    }
}

/// Ids from a sequence of integers or any array of them.
pub fn ids_of(ids: &Bound<'_, PyAny>) -> PyResult<Box<dyn Ids>> {
    if let Ok(list) = ids.cast::<PyList>() {
        return Ok(Box::new(of_list(list)?));
    }
    if let Ok(tuple) = ids.cast::<PyTuple>() {
        return Ok(Box::new(of_list(&tuple.to_list())?));
    }
    if let Some(array) = array(ids) {
        return Ok(array);
    }
    // What is no buffer may have an array to give, as a tensor does.
    let given = ids.getattr(intern!(ids.py(), "__array__")).and_then(|array| array.call0());
    if let Some(array) = given.ok().and_then(|given| array(&given)) {
        return Ok(array);
    }
    let values = ids.extract::<Vec<i64>>().map_err(|error| explained(ids.py(), error))?;
    let mut read = Listed { ids: room_for(values.len()).or_raise(ids.py())?, odd: None };
    for value in values {
        read.push(value);
    }
    Ok(Box::new(read))
}

/// Ids that were read one by one.
struct Listed {
    ids: Vec<TokenId>,
    /// The first number that is no id of 32 bits, and its place.
    odd: Option<(usize, i64)>,
}

impl Listed {
    fn push(&mut self, value: i64) {
        let id = TokenId::try_from(value).unwrap_or_else(|_| {
            self.odd.get_or_insert((self.ids.len(), value));
            NO_ID
        });
        self.ids.push(id);
    }
}

impl Ids for Listed {
    fn len(&self) -> usize {
        self.ids.len()
    }

    fn copy(&self, from: usize, room: &mut [TokenId]) {
        room.copy_from_slice(&self.ids[from..from + room.len()]);
    }

    fn number(&self, place: usize) -> i128 {
        match self.odd {
            Some((odd, value)) if odd == place => value.into(),
            _ => self.ids[place].into(),
        }
    }
}

fn of_list(list: &Bound<'_, PyList>) -> PyResult<Listed> {
    let py = list.py();
    let mut read = Listed { ids: room_for(list.len()).or_raise(py)?, odd: None };
    for place in 0..list.len() {
        // SAFETY: a list. Its end is looked at, for a number's own code may have moved it since.
        let item = unsafe { ffi::PyList_GetItem(list.as_ptr(), place.cast_signed()) };
        // SAFETY: the list holds the item, and nobody changes the list while this thread is attached and runs no code of Python.
        read.push(if !item.is_null() && unsafe { ffi::PyLong_CheckExact(item) } != 0 {
            let mut overflow = 0;
            // SAFETY: an int, of which neither code nor an exception comes.
            let value = unsafe { ffi::PyLong_AsLongLongAndOverflow(item, &raw mut overflow) };
            if overflow != 0 {
                return Err(beyond_64_bits(py));
            }
            value
        } else {
            // SAFETY: borrowed from the list, or null where an exception is set.
            let item = unsafe { Bound::from_borrowed_ptr_or_err(py, item) }?;
            item.extract::<i64>().map_err(|error| explained(py, error))?
        });
    }
    Ok(read)
}

fn explained(py: Python<'_>, error: PyErr) -> PyErr {
    if error.is_instance_of::<PyOverflowError>(py) { beyond_64_bits(py) } else { error }
}

fn beyond_64_bits(py: Python<'_>) -> PyErr {
    let what = "ids: found a number beyond 64 bits; expected ids below the vocabulary's size";
    to_python(py, &Error::Config(what.into()))
}

/// An integer of a buffer.
trait Number: Element + Into<i128> + Send + Sync {
    /// Reads it once, whoever writes it meanwhile.
    ///
    /// # Safety
    /// It is there, and aligned.
    unsafe fn read(place: *mut Self) -> Self;
    /// As an id.
    fn id(self) -> TokenId;
}

macro_rules! numbers {
    ($($number:ty, $atomic:ty;)*) => {$(
        impl Number for $number {
            #[inline]
            unsafe fn read(place: *mut Self) -> Self {
                // SAFETY: the caller's; a relaxed load of at most a word may read what cannot be written, too.
                unsafe { <$atomic>::from_ptr(place) }.load(Relaxed)
            }

            #[inline]
            fn id(self) -> TokenId {
                TokenId::try_from(self).unwrap_or(NO_ID)
            }
        }
    )*};
}

numbers! {
    u8, AtomicU8;
    i8, AtomicI8;
    u16, AtomicU16;
    i16, AtomicI16;
    u32, AtomicU32;
    i32, AtomicI32;
    u64, AtomicU64;
    i64, AtomicI64;
}

/// Numbers that lie in an object of Python's, each so many bytes behind the one before. Others may write them meanwhile.
struct Array<T: Element> {
    buffer: PyBuffer<T>,
    len: usize,
    stride: isize,
}

impl<T: Number> Array<T> {
    /// # Panics
    /// If the place is not in the array.
    #[inline]
    fn at(&self, place: usize) -> T {
        assert!(place < self.len);
        let first = self.buffer.buf_ptr();
        // SAFETY: the buffer has that many at that distance, and `of_buffer` has seen that all are aligned.
        unsafe { T::read(first.byte_offset(place.cast_signed() * self.stride).cast()) }
    }
}

impl<T: Number> Ids for Array<T> {
    fn len(&self) -> usize {
        self.len
    }

    fn copy(&self, from: usize, room: &mut [TokenId]) {
        (from..).zip(room).for_each(|(place, id)| *id = self.at(place).id());
    }

    fn number(&self, place: usize) -> i128 {
        self.at(place).into()
    }
}

/// Integers of one dimension in this machine's order of bytes, where they lie; what else there is goes the way of sequences,
/// which reads it or refuses it.
fn array(ids: &Bound<'_, PyAny>) -> Option<Box<dyn Ids>> {
    use ElementType::{SignedInteger, UnsignedInteger};
    let buffer = PyUntypedBuffer::get(ids).ok()?;
    let foreign: &[u8] = if cfg!(target_endian = "little") { b"!>" } else { b"<" };
    let format = buffer.format().to_bytes();
    if buffer.dimensions() != 1 || format.first().is_none_or(|order| foreign.contains(order)) || format.ends_with(b"c")
    {
        return None;
    }
    match ElementType::from_format(buffer.format()) {
        UnsignedInteger { bytes: 1 } => of_buffer::<u8>(buffer),
        SignedInteger { bytes: 1 } => of_buffer::<i8>(buffer),
        UnsignedInteger { bytes: 2 } => of_buffer::<u16>(buffer),
        SignedInteger { bytes: 2 } => of_buffer::<i16>(buffer),
        UnsignedInteger { bytes: 4 } => of_buffer::<u32>(buffer),
        SignedInteger { bytes: 4 } => of_buffer::<i32>(buffer),
        UnsignedInteger { bytes: 8 } => of_buffer::<u64>(buffer),
        SignedInteger { bytes: 8 } => of_buffer::<i64>(buffer),
        _ => None,
    }
}

fn of_buffer<T: Number + 'static>(buffer: PyUntypedBuffer) -> Option<Box<dyn Ids>> {
    let buffer = buffer.into_typed::<T>().ok()?;
    let (len, stride) = (buffer.item_count(), buffer.strides()[0]);
    let direct = buffer.suboffsets().is_none_or(|offsets| offsets[0] < 0);
    (direct && stride % align_of::<T>().cast_signed() == 0)
        .then(|| Box::new(Array { buffer, len, stride }) as Box<dyn Ids>)
}
