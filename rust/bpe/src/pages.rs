//! Pages of 2 MB for large arrays.
//!
//! First touch of fresh memory is dear: a fault for each page. And an array of some megabytes on pages of 4 KB, read
//! all over, asks for more translations of addresses than the processor keeps. Linux gives pages of 2 MB to memory that
//! asks for them before it is touched, wherever a whole one fits in.

use std::mem::MaybeUninit;

/// Size of a large page; an array that is smaller gains nothing.
#[cfg(target_os = "linux")]
const PAGE: usize = 1 << 21;

/// Asks for large pages for all that a vector has room for. Elsewhere than on Linux, and where the system says no,
/// nothing happens.
#[allow(clippy::ptr_arg, reason = "its room is what matters")]
pub(crate) fn large<T>(vector: &Vec<T>) {
    advise(vector.as_ptr() as usize, vector.capacity() * size_of::<T>());
}

/// The same for room that nobody has written to.
pub(crate) fn large_room(room: &mut [MaybeUninit<u8>]) {
    advise(room.as_ptr() as usize, room.len());
}

fn advise(start: usize, bytes: usize) {
    #[cfg(target_os = "linux")]
    {
        if bytes < PAGE {
            return;
        }
        let page = start & !4095;
        // SAFETY: advice changes no contents; and the pages from the room's first byte to its last are mapped.
        unsafe { libc::madvise(page as *mut libc::c_void, start + bytes - page, libc::MADV_HUGEPAGE) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (start, bytes);
}
