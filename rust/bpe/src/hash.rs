//! The one seed of all hash tables. No result depends on it: `BYTEKILN_HASH_SEED` lets tests show that.

use std::sync::OnceLock;

use foldhash::fast::FixedState;

/// The process's seed: 0 unless the environment says otherwise.
pub(crate) fn seed() -> u64 {
    static SEED: OnceLock<u64> = OnceLock::new();
    *SEED.get_or_init(|| std::env::var("BYTEKILN_HASH_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0))
}

/// A state for `std`'s tables with that seed.
pub(crate) fn state() -> FixedState {
    FixedState::with_seed(seed())
}

/// Asks for the cache line of a place that will be read soon.
#[inline]
pub(crate) fn prefetch<T>(slice: &[T], at: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch reads nothing; any address will do.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(slice.as_ptr().wrapping_add(at).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (slice, at);
}
