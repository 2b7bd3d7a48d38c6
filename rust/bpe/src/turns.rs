//! Many threads work, what each makes is taken in its turn: the result is the same whatever their number.
//!
//! In: numbered parts of a job. Out: their results, in order, in one place. Called by `corpus` and `encode`.
//!
//! Nobody waits for his turn: a part that comes before it is left behind, and whoever brings the one before takes it, too. A
//! thread that slept for every part would be woken too late for every part.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex};
use std::thread;

use crate::error::{Error, Result};

/// A place for results, and whose turn it is.
pub(crate) struct Turns<T, P> {
    state: Mutex<State<T, P>>,
    changed: Condvar,
}

struct State<T, P> {
    turn: u64,
    failed: bool,
    place: T,
    /// Parts that came before their turn: not more than there are threads.
    early: BTreeMap<u64, P>,
    most: usize,
    /// Parts that were taken, for others to be made in.
    used: Vec<P>,
}

impl<T: Send, P: Send + Default> Turns<T, P> {
    /// For so many threads.
    pub(crate) fn new(place: T, threads: usize) -> Self {
        let (early, used) = (BTreeMap::new(), Vec::new());
        let state = State { turn: 0, failed: false, place, early, most: threads.max(1), used };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Brings part `number`, from 0; `take` is called with each part when all before it were taken. Leaves room for another
    /// part in `part`, with what a former one has left in it.
    ///
    /// # Errors
    /// What `take` says; [`Error::Interrupted`] once another thread has failed.
    pub(crate) fn bring(&self, number: u64, part: &mut P, take: impl Fn(&mut T, &mut P) -> Result<()>) -> Result<()> {
        let guard = self.state.lock().map_err(|_| Error::Interrupted)?;
        let is_full =
            |state: &mut State<T, P>| state.turn != number && state.early.len() >= state.most && !state.failed;
        let mut state = self.changed.wait_while(guard, is_full).map_err(|_| Error::Interrupted)?;
        if state.failed {
            return Err(Error::Interrupted);
        }
        if state.turn != number {
            let room = state.used.pop().unwrap_or_default();
            state.early.insert(number, std::mem::replace(part, room));
            return Ok(());
        }
        let State { turn, place, early, used, .. } = &mut *state;
        loop {
            take(place, part)?;
            *turn += 1;
            let Some(next) = early.remove(turn) else { break };
            used.push(std::mem::replace(part, next));
        }
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
struct Abandon<'a, T, P>(&'a Turns<T, P>);

impl<T, P> Drop for Abandon<'_, T, P> {
    fn drop(&mut self) {
        if let Ok(mut state) = self.0.state.lock() {
            state.failed = true;
        }
        self.0.changed.notify_all();
    }
}
