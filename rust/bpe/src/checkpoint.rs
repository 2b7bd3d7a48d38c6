//! Training that survives Ctrl-C, `kill -9` and a power cut: what is counted and what is merged, on disk.
//!
//! In: counts and merges. Out: two files that are replaced atomically, and what they said when they
//! are read again. Called by `trainer`.
//!
//! `FILE` is a counts file ([`Counts::save`]): of all text before one place between two chunks, later of all text. How
//! much that is, its own number of bytes says. `FILE.merges` holds the merges done so far; it is small, and written more
//! often. Words as the tokens that these merges make, with counts of the whole text, are all that training is about to
//! know at that point, so that it goes on to the same result. `FILE.merges` also says with what settings and inputs: it is
//! written before `FILE` is, and whoever reads or writes either holds a lock on it. Both carry checksums. Both are deleted when
//! the result is saved.

mod merges_file;

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, UNIX_EPOCH};

use crate::atomic::{AtomicFile, check_output, hold};
use crate::counts::{Counts, Memory};
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::train::Pair;
use merges_file::{bytes_of, read};

/// Bounds of the time between two savings, where nobody says how long it is.
const LEAST: Duration = Duration::from_secs(1);
const MOST: Duration = Duration::from_secs(60);
/// Of saving counts, in so many words: what it takes here, of which machines and disks make a multiple.
const SAVING: Duration = Duration::from_millis(10);
const SAVING_A_WORD: Duration = Duration::from_nanos(250);
/// How often, and after what time, a run that meets another one's beginning looks again: for so long nobody can stop it.
const LOOKS: u32 = 50;
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// A setting or an input by its name, and what it is.
pub type Setting = (String, String);

/// The merges that a run has done, without those of a tokenizer that it extends.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Done {
    /// In their order.
    pub pairs: Vec<Pair>,
    /// How often each pair occurred.
    pub counts: Vec<u64>,
    /// How often the tie rule decided.
    pub ties: u64,
}

/// Where a run is kept, and when it was kept last. Nobody else gets at it as long as this lives.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    settings: Vec<Setting>,
    /// Time between two savings; unset: twenty times what one takes.
    every: Option<Duration>,
    last: Instant,
    /// What saving counts takes, as a multiple of [`SAVING`] and [`SAVING_A_WORD`].
    pace: f64,
    /// What saving the merges took the last time.
    merges_cost: Duration,
    /// The second file, locked.
    lock: File,
}

/// The second file.
fn merges_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".merges");
    name.into()
}

/// What saving so many words takes on the machine of [`SAVING_A_WORD`].
fn saving(words: u64) -> Duration {
    SAVING + Duration::from_nanos(words.saturating_mul(SAVING_A_WORD.as_nanos() as u64))
}

/// An input as a setting: its name, size and time of its last change.
pub fn input(number: usize, path: &Path) -> Result<Setting> {
    let found = fs::metadata(path).map_err(|e| Error::io(path, &e))?;
    let changed = found.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
    let whole = fs::canonicalize(path).unwrap_or_else(|_| path.into());
    let value = format!("{} of {} bytes, changed at {} ns", whole.display(), found.len(), changed.as_nanos());
    Ok((format!("input {number}"), value))
}

impl Checkpoint {
    /// Takes up what is at `path`, or begins: counts of a part of the text, or none yet, and merges.
    ///
    /// # Errors
    /// A file that is no checkpoint or a broken one; one of a run with other settings or inputs, the first of which is
    /// named; a folder that is not there; another process goes on with it.
    pub fn open(
        path: &Path,
        settings: Vec<Setting>,
        every: Option<Duration>,
        memory: Memory,
    ) -> Result<(Self, Option<Counts>, Done)> {
        check_output(path, true)?;
        let merges = merges_path(path);
        let taken = || {
            let what = "another process goes on with it; expected its end, or another checkpoint".into();
            Error::File { path: path.into(), what }
        };
        let mut looks = 0;
        let (lock, is_new) = loop {
            if let Some(lock) = hold(&merges, taken)? {
                break (lock, false);
            }
            // Of several that find nothing one begins; for the others there is something then.
            match AtomicFile::create_alone(&merges, false) {
                Ok(Some(file)) if path.exists() => {
                    drop(file);
                    let what = format!(
                        "is there without {}, which says of what run it is; expected both, or neither",
                        merges.display()
                    );
                    return Err(Error::File { path: path.into(), what });
                }
                Ok(Some(mut file)) => {
                    file.write(&bytes_of(&merges, &settings, &Done::default())?)?;
                    break (file.commit_and_hold()?, true);
                }
                Ok(None) if looks == LOOKS => return Err(taken()),
                Ok(None) => {
                    looks += 1;
                    thread::sleep(LOOK_AGAIN);
                }
                Err(Error::Exists(_)) => {}
                Err(error) => return Err(error),
            }
        };
        let (last, merges_cost) = (Instant::now(), Duration::ZERO);
        let this = Self { path: path.into(), settings, every, last, pace: 1.0, merges_cost, lock };
        if is_new {
            return Ok((this, None, Done::default()));
        }
        let done = read(&merges, &this.settings)?;
        let counts = path.exists().then(|| Counts::load_kept(path, memory)).transpose()?;
        Ok((this, counts, done))
    }

    /// Whether it is time to save counts of about so many words.
    pub fn are_counts_due(&self, words: u64) -> bool {
        self.is_over(saving(words).mul_f64(self.pace))
    }

    /// Whether it is time to save merges.
    pub fn are_merges_due(&self) -> bool {
        self.is_over(self.merges_cost)
    }

    fn is_over(&self, cost: Duration) -> bool {
        self.last.elapsed() >= self.every.unwrap_or_else(|| (20 * cost).clamp(LEAST, MOST))
    }

    /// Saves the counts so far, for which counting stands still since `since`.
    ///
    /// # Errors
    /// [`Error::Interrupted`], with what was saved before still there.
    pub fn save_counts(&mut self, counts: &mut Counts, since: Instant, progress: &Progress) -> Result<()> {
        let saved = counts.save(&self.path, true, progress)?;
        self.last = Instant::now();
        self.pace = (self.last - since).div_duration_f64(saving(saved.distinct_pretokens));
        Ok(())
    }

    /// Saves the merges done so far.
    pub fn save_merges(&mut self, done: &Done) -> Result<()> {
        let (start, path) = (Instant::now(), merges_path(&self.path));
        let mut file = AtomicFile::create(&path, true)?;
        file.write(&bytes_of(&path, &self.settings, done)?)?;
        // The lock of the file that was there is given up behind this one's.
        self.lock = file.commit_and_hold()?;
        self.last = Instant::now();
        self.merges_cost = self.last - start;
        Ok(())
    }

    /// Deletes what is kept, the second file last: as long as it is there, it is locked.
    pub fn discard(self) -> Result<()> {
        for path in [&self.path, &merges_path(&self.path)] {
            match fs::remove_file(path) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(Error::io(path, &error)),
                _ => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pretokenize::{Pattern, Splitter, TextPolicy};

    fn settings(seed: &str) -> Vec<Setting> {
        vec![("pattern".into(), "gpt2".into()), ("input 1".into(), seed.into())]
    }

    fn memory() -> Memory {
        Memory::new(None, None).unwrap()
    }

    fn open(path: &Path, settings: Vec<Setting>) -> Result<(Option<Counts>, Done)> {
        Checkpoint::open(path, settings, None, memory()).map(|(_, counts, done)| (counts, done))
    }

    fn saved(path: &Path) -> (Counts, Done) {
        let (mut kept, counts, done) = Checkpoint::open(path, settings("a"), None, memory()).unwrap();
        assert!(counts.is_none() && done == Done::default());
        let splitter = Splitter::new(Pattern::new("gpt2").unwrap().into(), &[]).unwrap();
        let mut counts = Counts::new(splitter, TextPolicy::Error, memory());
        counts.add_text(b"the kiln and the potter").unwrap();
        kept.save_counts(&mut counts, Instant::now(), &Progress::default()).unwrap();
        let done = Done { pairs: vec![(97, 98), (256, 70_000)], counts: vec![u64::MAX, 3], ties: 5 };
        kept.save_merges(&done).unwrap();
        (counts, done)
    }

    #[test]
    fn what_was_saved_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.ck");
        let (mut counts, done) = saved(&path);
        let (again, read) = open(&path, settings("a")).unwrap();
        let mut again = again.unwrap();
        assert_eq!((read, again.about().unwrap()), (done, counts.about().unwrap()));
        assert_eq!(
            again.most_common(9, &Progress::default()).unwrap(),
            counts.most_common(9, &Progress::default()).unwrap()
        );
    }

    #[test]
    fn one_run_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.ck");
        saved(&path);
        let (mut first, ..) = Checkpoint::open(&path, settings("a"), None, memory()).unwrap();
        let refused = || open(&path, settings("a")).unwrap_err().to_string();
        assert!(refused().contains("run.ck: another process goes on with it"));
        // The lock goes over to the file that takes the other one's place.
        first.save_merges(&Done::default()).unwrap();
        assert!(refused().contains("run.ck: another process goes on with it"));
        drop(first);
        open(&path, settings("a")).unwrap();
    }

    #[test]
    fn of_many_that_begin_at_once_one_does() {
        let folder = tempfile::tempdir().unwrap();
        for n in 0..200 {
            let path = folder.path().join(format!("{n}.ck"));
            let start = std::sync::Barrier::new(4);
            let begin = || {
                start.wait();
                Checkpoint::open(&path, settings("a"), None, memory()).map(|(kept, ..)| kept)
            };
            let outcomes: Vec<_> = thread::scope(|scope| {
                let all: Vec<_> = (0..4).map(|_| scope.spawn(begin)).collect();
                all.into_iter().map(|one| one.join().unwrap()).collect()
            });
            assert_eq!(outcomes.iter().filter(|one| one.is_ok()).count(), 1, "{outcomes:?}");
            for said in outcomes.iter().filter_map(|one| one.as_ref().err()) {
                assert!(said.to_string().contains(".ck: another process goes on with it"), "{said}");
            }
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 200);
    }

    #[test]
    fn what_is_discarded_is_held_to_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.ck");
        saved(&path);
        let (kept, ..) = Checkpoint::open(&path, settings("a"), None, memory()).unwrap();
        assert!(open(&path, settings("a")).is_err());
        kept.discard().unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        let (counts, done) = open(&path, settings("a")).unwrap();
        assert!(counts.is_none() && done == Done::default());
    }

    #[test]
    fn a_twentieth_of_the_time_goes_into_saving() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.ck");
        let (mut counts, _) = saved(&path);
        let (mut kept, ..) = Checkpoint::open(&path, settings("a"), None, memory()).unwrap();
        let ago = |seconds| Instant::now().checked_sub(Duration::from_secs(seconds)).unwrap();
        let after = |kept: &mut Checkpoint, seconds| kept.last = ago(seconds);
        // Before the first one: the more there is, the later.
        after(&mut kept, 3);
        assert!(kept.are_counts_due(100_000) && !kept.are_counts_due(1_000_000));
        after(&mut kept, 61);
        assert!(kept.are_counts_due(1 << 40));
        // Counting stood for two seconds, most of them before a byte was written.
        kept.save_counts(&mut counts, ago(2), &Progress::default()).unwrap();
        after(&mut kept, 39);
        assert!(!kept.are_counts_due(4));
        after(&mut kept, 43);
        assert!(kept.are_counts_due(4));
        // Merges are another matter.
        kept.save_merges(&Done::default()).unwrap();
        after(&mut kept, 30);
        assert!(kept.are_merges_due());
    }

    #[test]
    fn what_cannot_be_saved_in_time_leaves_what_was_saved() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.ck");
        let (mut counts, _) = saved(&path);
        let before = fs::read(&path).unwrap();
        let (mut kept, ..) = Checkpoint::open(&path, settings("a"), None, memory()).unwrap();
        counts.add_text(b"one more").unwrap();
        let stopped = Progress::default();
        stopped.stop();
        let said = kept.save_counts(&mut counts, Instant::now(), &stopped);
        assert!(matches!(said, Err(Error::Interrupted)));
        assert_eq!((fs::read(&path).unwrap(), fs::read_dir(folder.path()).unwrap().count()), (before, 2));
    }

    #[test]
    fn another_run_and_a_broken_file_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.ck");
        saved(&path);
        let said = open(&path, settings("b")).unwrap_err().to_string();
        assert!(said.contains("input 1 a; found input 1 b"), "{said}");
        let said = open(&path, settings("a")[..1].to_vec()).unwrap_err().to_string();
        assert!(said.contains("input 1 a; found inputs fewer"), "{said}");
        // The blocks of a counts file are checked when they are read.
        let read_all = || {
            let (counts, _) = open(&path, settings("a"))?;
            counts.map_or(Ok(()), |mut counts| counts.for_each(1, &Progress::default(), |_, _| Ok(())))
        };
        for file in [merges_path(&path), path.clone()] {
            let whole = fs::read(&file).unwrap();
            let refused = |bytes: &[u8], how: String| {
                fs::write(&file, bytes).unwrap();
                let said = read_all().expect_err(&how).to_string();
                assert!(said.contains("run.ck"), "{how}: {said}");
            };
            for n in 0..whole.len() {
                let mut flipped = whole.clone();
                flipped[n] ^= 1;
                refused(&flipped, format!("byte {n} flipped"));
                refused(&whole[..n], format!("cut at {n}"));
            }
            fs::write(&file, whole).unwrap();
            read_all().unwrap();
        }
        fs::remove_file(merges_path(&path)).unwrap();
        assert!(open(&path, settings("a")).unwrap_err().to_string().contains("expected both, or neither"));
    }
}
