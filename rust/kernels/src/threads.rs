//! Threads that share the jobs of a call. A pool is made at the first call that wants so many threads and kept.
//!
//! A process that `fork` made has none of its parent's threads: pools belong to a process id, and a child makes its
//! own. Pools are found through atomic pointers, because a lock might be held by another thread just when the process
//! is forked, and would never open in the child.

use std::process;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use rayon::{ThreadPool, ThreadPoolBuilder};

/// More threads than this share no call.
pub const MOST: usize = 64;

struct Pool {
    process: u32,
    pool: ThreadPool,
}

static POOLS: [AtomicPtr<Pool>; MOST + 1] = [const { AtomicPtr::new(ptr::null_mut()) }; MOST + 1];

/// Calls `job(0)`, …, `job(jobs - 1)`, each once, on up to `threads` threads in any order.
pub fn share(threads: usize, jobs: usize, job: impl Fn(usize) + Sync) {
    let threads = threads.min(jobs).min(MOST);
    let pool = if threads > 1 { pool(threads) } else { None };
    let next = AtomicUsize::new(0);
    let work = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= jobs {
                break;
            }
            job(index);
        }
    };
    match pool {
        // This thread works too: one fewer to wake, and the first jobs are done meanwhile.
        Some(pool) => pool.in_place_scope(|scope| {
            for _ in 1..threads {
                scope.spawn(|_| work());
            }
            work();
        }),
        None => work(),
    }
}

/// The pool that lends `threads - 1` threads; none where the system gives no threads.
fn pool(threads: usize) -> Option<&'static ThreadPool> {
    let slot = &POOLS[threads];
    let process = process::id();
    let known = slot.load(Ordering::Acquire);
    // SAFETY: a pointer in a slot came from `Box::into_raw` and is never freed.
    if let Some(known) = unsafe { known.as_ref() }
        && known.process == process
    {
        return Some(&known.pool);
    }
    let pool = ThreadPoolBuilder::new().num_threads(threads - 1).thread_name(|_| "bytekiln".into()).build().ok()?;
    // Left for ever, at most one a process and number of threads. The parent's is left too where this is a child: to
    // drop it would speak to threads that are not here.
    let mine = Box::into_raw(Box::new(Pool { process, pool }));
    match slot.compare_exchange(known, mine, Ordering::AcqRel, Ordering::Acquire) {
        // SAFETY: just made, and never freed from now on.
        Ok(_) => Some(unsafe { &(*mine).pool }),
        Err(first) => {
            // Another thread of this process was faster.
            // SAFETY: `mine` was never shared; `first` is in the slot, so it is never freed.
            unsafe {
                drop(Box::from_raw(mine));
                Some(&(*first).pool)
            }
        }
    }
}
