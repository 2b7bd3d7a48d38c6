//! Many threads work, each in its turn hands over what it made: the result is the same whatever their number.
//!
//! In: numbered parts of a job. Out: their results, in order, in one place. Called by `corpus` and `encode`.

use std::sync::{Condvar, Mutex};
use std::thread;

use crate::error::{Error, Result};

/// A place for results, and whose turn it is.
pub(crate) struct Turns<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

struct State<T> {
    turn: u64,
    failed: bool,
    place: T,
}

impl<T: Send> Turns<T> {
    pub(crate) fn new(place: T) -> Self {
        Self { state: Mutex::new(State { turn: 0, failed: false, place }), changed: Condvar::new() }
    }

    /// Hands over part `number`, from 0, when all before it are there.
    ///
    /// # Errors
    /// What `hand_over` says; [`Error::Interrupted`] once another thread has failed.
    pub(crate) fn wait(&self, number: u64, hand_over: impl FnOnce(&mut T) -> Result<()>) -> Result<()> {
        let guard = self.state.lock().map_err(|_| Error::Interrupted)?;
        let waited = self.changed.wait_while(guard, |state| state.turn != number && !state.failed);
        let mut state = waited.map_err(|_| Error::Interrupted)?;
        if state.failed {
            return Err(Error::Interrupted);
        }
        hand_over(&mut state.place)?;
        state.turn += 1;
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// Runs `work` on some threads, this one among them.
    ///
    /// # Errors
    /// The cause of the failure, rather than that others stopped because of it.
    pub(crate) fn work(&self, threads: usize, work: impl Fn() -> Result<()> + Sync) -> Result<()> {
        // Whoever fails, by a panic even, tells those who wait for its turn.
        let work = || {
            let abandon = Abandon(self);
            work().inspect(|()| std::mem::forget(abandon))
        };
        thread::scope(|scope| {
            let others: Vec<_> = (1..threads.max(1)).map(|_| scope.spawn(work)).collect();
            let mut results = vec![work()];
            let join = |other: thread::ScopedJoinHandle<'_, _>| {
                other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            results.extend(others.into_iter().map(join));
            let mut errors: Vec<_> = results.into_iter().filter_map(Result::err).collect();
            errors.sort_by_key(|e| matches!(e, Error::Interrupted));
            errors.into_iter().next().map_or(Ok(()), Err)
        })
    }

    /// What was handed over.
    pub(crate) fn into_inner(self) -> Result<T> {
        self.state.into_inner().map(|state| state.place).map_err(|_| Error::Interrupted)
    }
}

/// Dropped by a thread that did not finish: nobody need wait for it any longer.
struct Abandon<'a, T>(&'a Turns<T>);

impl<T> Drop for Abandon<'_, T> {
    fn drop(&mut self) {
        if let Ok(mut state) = self.0.state.lock() {
            state.failed = true;
        }
        self.0.changed.notify_all();
    }
}
