//! Many threads work, what each makes is taken in its turn: the result is the same whatever their number.
//!
//! In: numbered parts of a job. Out: their results, in order, in one place. Called by `corpus` and `encode`.
//!
//! Nobody sleeps until it is his turn: a part that comes early is left behind, and whoever brings the one before takes it, too.
//! A thread that slept for every part would be woken too late for every part. In return a thread may have two parts.

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

impl<T: Send, P: Send> Turns<T, P> {
    /// For so many threads.
    pub(crate) fn new(place: T, threads: usize) -> Self {
        let (early, used) = (BTreeMap::new(), Vec::new());
        let state = State { turn: 0, failed: false, place, early, most: threads.max(1), used };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Brings part `number`, from 0; `take` is called with each part when all before it were taken. Leaves room for another
    /// part in `part`: one that was taken, or what `fresh` makes.
    ///
    /// # Errors
    /// What `take` says; [`Error::Interrupted`] once another thread has failed.
    pub(crate) fn bring(
        &self,
        number: u64,
        part: &mut P,
        fresh: impl FnOnce() -> P,
        take: impl Fn(&mut T, &mut P) -> Result<()>,
    ) -> Result<()> {
        let guard = self.state.lock().map_err(|_| Error::Interrupted)?;
        let is_full =
            |state: &mut State<T, P>| state.turn != number && state.early.len() >= state.most && !state.failed;
        let mut state = self.changed.wait_while(guard, is_full).map_err(|_| Error::Interrupted)?;
        if state.failed {
            return Err(Error::Interrupted);
        }
        if state.turn != number {
            let room = state.used.pop().unwrap_or_else(fresh);
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
    use std::time::Duration;

    #[test]
    fn parts_are_taken_in_order_and_few_wait() {
        for threads in 1..6 {
            let (turns, next) = (Turns::<Vec<u64>, Vec<u64>>::new(Vec::new(), threads), AtomicU64::new(0));
            let work = || {
                let mut part = Vec::new();
                loop {
                    let number = next.fetch_add(1, Relaxed);
                    if number >= 200 {
                        return Ok(());
                    }
                    // The first of five is the last one to come.
                    if number % 5 == 0 {
                        thread::sleep(Duration::from_micros(300));
                    }
                    part.clear();
                    part.push(number);
                    turns.bring(number, &mut part, Vec::new, |all, part| {
                        all.extend_from_slice(part);
                        Ok(())
                    })?;
                    let state = turns.state.lock().unwrap();
                    assert!(state.early.len() <= threads && state.used.len() <= threads);
                }
            };
            turns.work(threads, work).unwrap();
            assert_eq!(turns.into_inner().unwrap(), (0..200).collect::<Vec<_>>());
        }
    }

    #[test]
    fn who_fails_lets_nobody_wait() {
        let turns = Turns::<u64, u64>::new(0, 3);
        let next = AtomicU64::new(0);
        let failed = turns.work(3, || {
            loop {
                let number = next.fetch_add(1, Relaxed);
                if number == 0 {
                    thread::sleep(Duration::from_millis(5));
                    return Err(Error::Config("the first".into()));
                }
                turns.bring(number, &mut 0, || 0, |_, _| Ok(()))?;
            }
        });
        assert!(matches!(failed, Err(Error::Config(what)) if what == "the first"));
    }
}
