//! Encoding that survives Ctrl-C, `kill -9` and a power cut: a small file beside the output says how far it is.
//!
//! In: places that were reached. Out: `.NAME.state`, replaced atomically about once a second by a thread of its own, after the
//! ids that it speaks of are on the disk. Called by `corpus`.
//!
//! Layout: magic, version, JSON, XXH3 of all that; little-endian.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_64;

use super::file::file_name;
use super::outlet::OutletState;
use crate::atomic::{OpenFile, write_file};
use crate::checkpoint::Setting;
use crate::error::{Error, Result};
use crate::tokens::Source;

const MAGIC: &[u8; 16] = b"bytekiln encode\n";
const VERSION: u64 = 1;
/// Bytes before the JSON: magic and version.
const HEAD: usize = 24;
/// Time between two savings; more where they take longer than a fiftieth of it.
pub(super) const EVERY: Duration = Duration::from_secs(1);

/// A place between two chunks, and all that was made of the text before it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Place {
    /// Which of the inputs, and how many of its chunks are done.
    pub file: usize,
    pub chunks: u64,
    /// Of that input: bytes, their checksum, ends of documents, and whether text stands behind the last one.
    pub file_bytes: u64,
    pub file_checksum: String,
    pub file_ends: u64,
    pub file_open: bool,
    /// Inputs that are done.
    pub sources: Vec<Source>,
    /// Ids in all outputs.
    pub tokens: u64,
    /// Only names are to be given to the files.
    pub finished: bool,
    pub outlets: Vec<OutletState>,
}

#[derive(Serialize, Deserialize)]
struct Kept {
    settings: Vec<Setting>,
    place: Place,
}

/// Where it lies.
pub(super) fn state_path(out: &Path) -> PathBuf {
    out.with_file_name(format!(".{}.state", file_name(out)))
}

/// What an unfinished run of the same kind left; none where there is none.
///
/// # Errors
/// It is of another run, the first difference of which is named, or broken.
pub(super) fn read(path: &Path, settings: &[Setting]) -> Result<Option<Place>> {
    let Some(kept) = read_any(path)? else { return Ok(None) };
    let none = || ("inputs".to_string(), "fewer".to_string());
    for n in 0..kept.settings.len().max(settings.len()) {
        let theirs = kept.settings.get(n).cloned().unwrap_or_else(none);
        let ours = settings.get(n).cloned().unwrap_or_else(none);
        if theirs != ours {
            return Err(Error::Config(format!(
                "{}: is of an unfinished run with {} {}; found {} {}; expected the same to go on, another name, or --overwrite to begin anew",
                path.display(),
                theirs.0,
                theirs.1,
                ours.0,
                ours.1
            )));
        }
    }
    Ok(Some(kept.place))
}

/// How many files each output of an unfinished run had, whatever run that was.
pub(super) fn most_files(path: &Path) -> usize {
    let kept = read_any(path).ok().flatten();
    kept.and_then(|kept| kept.place.outlets.iter().map(|outlet| outlet.done.len()).max()).unwrap_or(0)
}

fn read_any(path: &Path) -> Result<Option<Kept>> {
    let broken = || {
        let what = "is a broken state of an unfinished run; expected a whole one, or --overwrite to begin anew";
        Error::format(path.display().to_string(), what)
    };
    let bytes = match fs::read(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        read => read.map_err(|e| Error::io(path, &e))?,
    };
    let (body, checksum) = bytes.split_last_chunk::<8>().ok_or_else(broken)?;
    if XxHash3_64::oneshot(body).to_le_bytes() != *checksum || !body.starts_with(MAGIC) || body.len() < HEAD {
        return Err(broken());
    }
    if body[MAGIC.len()..HEAD] != VERSION.to_le_bytes() {
        let what = format!("is of another version of the format; expected {VERSION}, or --overwrite to begin anew");
        return Err(Error::format(path.display().to_string(), what));
    }
    serde_json::from_slice(&body[HEAD..]).map(Some).map_err(|_| broken())
}

/// Writes states, one at a time.
pub(super) struct Saver {
    path: PathBuf,
    settings: Vec<Setting>,
    every: Duration,
    told: Mutex<Told>,
}

struct Told {
    busy: bool,
    /// When the last one was written, or the run began, and what writing took.
    last: Instant,
    took: Duration,
    /// A state lies on the disk.
    there: bool,
    failed: Option<Error>,
}

/// A place, and the files that must be on the disk before it is.
pub(super) type Snapshot = (Place, Vec<Arc<OpenFile>>);

impl Saver {
    pub fn new(path: PathBuf, settings: Vec<Setting>, every: Duration, there: bool) -> Self {
        let told = Told { busy: false, last: Instant::now(), took: Duration::ZERO, there, failed: None };
        Self { path, settings, every, told: Mutex::new(told) }
    }

    fn told(&self) -> Result<std::sync::MutexGuard<'_, Told>> {
        self.told.lock().map_err(|_| Error::Interrupted)
    }

    /// Whether it is time for a state. What the last one failed with is said here.
    pub fn is_due(&self) -> Result<bool> {
        let mut told = self.told()?;
        told.failed.take().map_or(Ok(()), Err)?;
        Ok(!told.busy && told.last.elapsed() >= self.every.max(50 * told.took.min(EVERY)))
    }

    /// Whether none is being written.
    pub fn is_idle(&self) -> Result<bool> {
        Ok(!self.told()?.busy)
    }

    /// Whether a state lies on the disk, or so much was done that one is worth it.
    pub fn is_worth_it(&self) -> bool {
        self.told().is_ok_and(|told| told.there || told.last.elapsed() >= self.every)
    }

    /// Whether a state lies on the disk.
    pub fn is_there(&self) -> bool {
        self.told().is_ok_and(|told| told.there)
    }

    /// Hands a state to the thread that writes it.
    pub fn hand_over(&self, to: &SyncSender<Snapshot>, snapshot: Snapshot) -> Result<()> {
        self.told()?.busy = true;
        match to.try_send(snapshot) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => Err(Error::Interrupted),
        }
    }

    /// What that thread does until the run is over.
    pub fn work(&self, snapshots: &Receiver<Snapshot>) {
        for snapshot in snapshots {
            let done = self.save(snapshot);
            if let Ok(mut told) = self.told() {
                told.busy = false;
                told.failed = done.err();
            }
        }
    }

    /// A channel for [`work`](Self::work).
    pub fn channel() -> (SyncSender<Snapshot>, Receiver<Snapshot>) {
        sync_channel(1)
    }

    /// Writes a state at once.
    pub fn save(&self, (place, files): Snapshot) -> Result<()> {
        let start = Instant::now();
        for file in files {
            file.sync().map_err(|e| Error::io(&self.path, &e))?;
        }
        let kept = Kept { settings: self.settings.clone(), place };
        let json =
            serde_json::to_vec(&kept).map_err(|e| Error::format(self.path.display().to_string(), e.to_string()))?;
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(json);
        let checksum = XxHash3_64::oneshot(&bytes);
        bytes.extend(checksum.to_le_bytes());
        write_file(&self.path, &bytes, true)?;
        let mut told = self.told()?;
        (told.last, told.took, told.there) = (Instant::now(), start.elapsed(), true);
        Ok(())
    }

    /// The run is over, or what it left is of no use.
    pub fn remove(&self) {
        remove(&self.path);
    }
}

/// Removes a state; what stays behind is found to be over by the next run.
pub(super) fn remove(path: &Path) {
    let _ = fs::remove_file(path);
}
