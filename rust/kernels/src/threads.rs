//! Threads that share the jobs of a call: those of the host's OpenMP where it has lent them, else a pool of our own.
//!
//! Two teams in one process are in each other's way: OpenMP's threads go on spinning for a while after their last job,
//! and ours wait for a processor meanwhile. A training step of 4 layers × 128 took 3 % more on two idle cores, 15 % on
//! busy ones. In one team the next job, whose ever it is, finds them awake.
//!
//! Our own pool is made at the first call that wants so many threads and kept.
//!
//! A process that `fork` made has none of its parent's threads: pools belong to a process id, and a child makes its
//! own. Pools are found through atomic pointers, because a lock might be held by another thread just when the process
//! is forked, and would never open in the child.

use std::any::Any;
use std::ffi::{c_uint, c_void};
use std::hint;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::process;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use rayon::{ThreadPool, ThreadPoolBuilder};

/// More threads than this share no call.
pub const MOST: usize = 64;

/// An output that jobs write piece by piece.
pub(crate) struct Pieces<'a, T = f32> {
    start: *mut T,
    len: usize,
    size: usize,
    of: PhantomData<&'a mut [T]>,
}

// SAFETY: whoever takes pieces vouches that no two that exist at a time overlap, but for such as are only read.
unsafe impl<T: Send> Sync for Pieces<'_, T> {}

impl<'a, T> Pieces<'a, T> {
    pub(crate) fn new(out: &'a mut [T], size: usize) -> Self {
        Self { start: out.as_mut_ptr(), len: out.len(), size, of: PhantomData }
    }

    /// All of it, to be read.
    ///
    /// # Safety
    /// Nobody writes any piece meanwhile.
    pub(crate) unsafe fn whole(&self) -> &[T] {
        // SAFETY: what `new` was given.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }

    /// How many numbers there are.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Where the first number stands.
    pub(crate) fn start(&self) -> *mut T {
        self.start
    }

    /// The numbers of `count` rows from `first` on, of `all` rows.
    ///
    /// # Safety
    /// They are there, and no number is anybody else's meanwhile.
    #[expect(clippy::mut_from_ref, reason = "they are disjoint")]
    pub(crate) unsafe fn rows(&self, first: usize, count: usize, all: usize) -> &mut [T] {
        let wide = self.len / all;
        // SAFETY: the caller's.
        unsafe { self.from(first * wide, count * wide) }
    }

    /// `len` numbers from a place on, whatever the size of the pieces.
    ///
    /// # Safety
    /// They are all there, and no number is anybody else's meanwhile.
    #[expect(clippy::mut_from_ref, reason = "they are disjoint")]
    pub(crate) unsafe fn from(&self, at: usize, len: usize) -> &mut [T] {
        assert!(at + len <= self.len);
        // SAFETY: inside the slice that `new` was given, by the caller's word.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), len) }
    }

    /// # Safety
    /// No index twice.
    #[expect(clippy::mut_from_ref, reason = "the pieces are disjoint")]
    pub(crate) unsafe fn piece(&self, index: usize) -> &mut [T] {
        let from = self.len.min(index * self.size);
        let to = self.len.min(from + self.size);
        // SAFETY: inside the slice that `new` was given; disjoint by the caller's word.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(from), to - from) }
    }
}

struct Pool {
    process: u32,
    pool: ThreadPool,
}

static POOLS: [AtomicPtr<Pool>; MOST + 1] = [const { AtomicPtr::new(ptr::null_mut()) }; MOST + 1];

/// GNU OpenMP's `GOMP_parallel`, which LLVM's and Intel's have too: calls the function with the argument on each thread of
/// a team of up to so many, this one among them, and returns when all have. The last is for flags, of which 0 has none.
pub type Parallel = unsafe extern "C" fn(extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint);

static LENT: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());
static LENT_TO: AtomicU32 = AtomicU32::new(0);

/// From now on calls run on the threads of the host's OpenMP; with none, on our own again.
///
/// Not in a process that is forked from this one: OpenMP would wait there for the parent's threads.
///
/// # Safety
/// The function is `GOMP_parallel` of a library that is never unloaded.
pub unsafe fn borrow(parallel: Option<Parallel>) {
    LENT_TO.store(process::id(), Ordering::Relaxed);
    LENT.store(parallel.map_or(ptr::null_mut(), |f| f as *mut c_void), Ordering::Release);
}

fn lent() -> Option<Parallel> {
    let address = LENT.load(Ordering::Acquire);
    if address.is_null() || LENT_TO.load(Ordering::Relaxed) != process::id() {
        return None;
    }
    // SAFETY: what `borrow` stored.
    Some(unsafe { std::mem::transmute::<*mut c_void, Parallel>(address) })
}

/// What the threads of OpenMP are given.
struct Shared<'a> {
    next: AtomicUsize,
    jobs: usize,
    job: &'a (dyn Fn(usize) + Sync),
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

extern "C" fn work(shared: *mut c_void) {
    // SAFETY: the address of a `Shared` that `share_in_team` keeps until all threads have returned.
    let shared = unsafe { &*shared.cast::<Shared<'_>>() };
    let all = || loop {
        let index = shared.next.fetch_add(1, Ordering::Relaxed);
        if index >= shared.jobs {
            break;
        }
        (shared.job)(index);
    };
    if let Err(panic) = catch_unwind(AssertUnwindSafe(all)) {
        shared.next.fetch_max(shared.jobs, Ordering::Relaxed); // the rest is not begun
        *shared.panic.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(panic);
    }
}

/// `threads` is the host's own number, whatever the number of jobs: OpenMP would make its team anew for another.
fn share_in_team(parallel: Parallel, threads: usize, jobs: usize, job: &(dyn Fn(usize) + Sync)) {
    let mut shared = Shared { next: AtomicUsize::new(0), jobs, job, panic: Mutex::new(None) };
    let team = c_uint::try_from(threads).unwrap_or(c_uint::MAX);
    // SAFETY: `GOMP_parallel`, by the word of whoever lent it; `work` does not unwind and gets what it expects.
    unsafe { parallel(work, (&raw mut shared).cast(), team, 0) };
    if let Some(panic) = shared.panic.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        resume_unwind(panic);
    }
}

/// Turns of a loop that waits for the last job before it lets other threads have the processor: some 20 µs, less than
/// it takes to sleep and be woken.
const SPINS: usize = 500;

/// A call whose jobs our own threads share: what its helpers hold. They may come late, even after the call is over.
struct Call {
    next: AtomicUsize,
    jobs: usize,
    /// Helpers that may be at work; they count themselves before they look whether the call is closed.
    inside: AtomicUsize,
    closed: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// The job of the call; alive while it is not closed, or somebody is inside.
    job: &'static (dyn Fn(usize) + Sync),
}

impl Call {
    fn work(&self) {
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= self.jobs {
                break;
            }
            (self.job)(index);
        }
    }

    fn help(&self) {
        // Sequentially consistent, as is `close`: either this sees the call closed, or `close` sees this one inside.
        self.inside.fetch_add(1, Ordering::SeqCst);
        if !self.closed.load(Ordering::SeqCst)
            && let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.work()))
        {
            *self.panic.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(panic);
        }
        self.inside.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Closes a call, also when this thread's own job panics: nobody is inside afterwards, and nobody comes in.
struct Close<'a>(&'a Call);

impl Drop for Close<'_> {
    fn drop(&mut self) {
        self.0.next.fetch_max(self.0.jobs, Ordering::Relaxed); // after a panic the rest is not begun
        self.0.closed.store(true, Ordering::SeqCst);
        let mut turns = 0;
        while self.0.inside.load(Ordering::SeqCst) > 0 {
            turns += 1;
            if turns < SPINS { hint::spin_loop() } else { thread::yield_now() }
        }
    }
}

/// Calls `job(0)`, …, `job(jobs - 1)`, each once, on up to `threads` threads in any order.
///
/// This thread works too. On our own threads it waits for no helper that has not begun: once all jobs are taken, those
/// at work are all that is left. A scope of the pool would sleep and be woken for every call.
pub fn share(threads: usize, jobs: usize, job: impl Fn(usize) + Sync) {
    if threads > 1
        && jobs > 1
        && let Some(parallel) = lent()
    {
        return share_in_team(parallel, threads, jobs, &job);
    }
    let threads = threads.min(jobs).min(MOST);
    let Some(pool) = (if threads > 1 { pool(threads) } else { None }) else {
        (0..jobs).for_each(job);
        return;
    };
    let job: &(dyn Fn(usize) + Sync) = &job;
    // SAFETY: it is used inside the call alone, and `Close` waits until nobody is.
    let job = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(job) };
    let (next, inside) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let call = Arc::new(Call { next, jobs, inside, closed: AtomicBool::new(false), panic: Mutex::new(None), job });
    for _ in 1..threads {
        let call = Arc::clone(&call);
        pool.spawn(move || call.help());
    }
    {
        let _close = Close(&call);
        call.work();
    }
    if let Some(panic) = call.panic.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take() {
        resume_unwind(panic);
    }
}

/// [`share`] of jobs that come in stages: no job begins before all jobs of the stages before it are done.
///
/// One meeting of the threads instead of one a stage: who is done waits for the others awake. `job` is given the stage
/// and the index in it.
pub fn share_in_stages<const N: usize>(threads: usize, stages: [usize; N], job: impl Fn(usize, usize) + Sync) {
    let (done, broken) = (AtomicUsize::new(0), AtomicBool::new(false));
    share(threads, stages.iter().sum(), |index| {
        let (mut stage, mut first) = (0, 0);
        while index - first >= stages[stage] {
            first += stages[stage];
            stage += 1;
        }
        // Jobs are taken in order: whatever this one waits for is being done.
        let mut turns = 0;
        while done.load(Ordering::Acquire) < first {
            if broken.load(Ordering::Relaxed) {
                return;
            }
            turns += 1;
            if turns < SPINS { hint::spin_loop() } else { thread::yield_now() }
        }
        let panic = Broken(&broken);
        job(stage, index - first);
        std::mem::forget(panic);
        done.fetch_add(1, Ordering::Release);
    });
}

/// Says so when a job panics: nobody waits for it.
struct Broken<'a>(&'a AtomicBool);

impl Drop for Broken<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
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

#[cfg(test)]
mod tests {
    use super::{share, share_in_stages};
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    #[test]
    fn every_job_is_done_once_whoever_calls() {
        std::thread::scope(|scope| {
            for caller in 0..4 {
                scope.spawn(move || {
                    for round in 0..300 {
                        let jobs = (round * 7 + caller) % 40;
                        let done: Vec<AtomicUsize> = (0..jobs).map(|_| AtomicUsize::new(0)).collect();
                        share(1 + round % 5, jobs, |i| {
                            done[i].fetch_add(1, Relaxed);
                        });
                        assert!(done.iter().all(|n| n.load(Relaxed) == 1));
                    }
                });
            }
        });
    }

    #[test]
    fn a_stage_begins_when_the_one_before_is_done() {
        for round in 0..300 {
            let stages = [round % 7, (round * 5) % 11, 0, (round * 3) % 13];
            let done = [const { AtomicUsize::new(0) }; 4];
            share_in_stages(1 + round % 4, stages, |stage, index| {
                assert!(index < stages[stage]);
                for before in 0..stage {
                    assert_eq!(done[before].load(Relaxed), stages[before]);
                }
                done[stage].fetch_add(1, Relaxed);
            });
            assert_eq!(done.map(AtomicUsize::into_inner), stages);
        }
        let told = std::panic::catch_unwind(|| share_in_stages(3, [4, 4], |stage, index| assert!(stage + index != 3)));
        assert!(told.is_err());
    }

    #[test]
    fn a_panic_of_any_thread_reaches_the_caller() {
        for bad in [0, 7, 63] {
            let told = std::panic::catch_unwind(|| {
                share(3, 64, |i| assert!(i != bad, "job {i}"));
            });
            assert!(told.is_err());
        }
        share(3, 64, |_| ()); // and the threads are still there
    }
}
