//! Writing a file so that a reader sees the old one or the whole new one: temporary file in the same folder,
//! fsync, rename, fsync of the folder. The temporary file is locked, so a second writer is refused by name.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use crate::error::{Error, Result};

/// So many bytes go to the disk together, in a thread, while others are made: the sync at the end then has little to wait for
/// (of 29 MB on a virtual disk 45 ms, a tenth of the whole work of encoding them).
const SENT_TOGETHER: u64 = 4 << 20;

/// An open file that several threads may bring to the disk.
///
/// The system tells an error of writing once, to whoever syncs next. Here all are told, from then on: nobody takes for durable
/// what another one knows to be lost.
#[derive(Debug)]
pub struct OpenFile {
    file: File,
    failed: Mutex<Option<(io::ErrorKind, String)>>,
}

impl OpenFile {
    fn new(file: File) -> Self {
        Self { file, failed: Mutex::new(None) }
    }

    /// Brings what was written to the disk.
    ///
    /// # Errors
    /// What the first one that failed was told.
    pub fn sync(&self) -> io::Result<()> {
        self.synced_by(File::sync_data)
    }

    /// One after the other: who comes later learns how it went.
    fn synced_by(&self, sync: impl FnOnce(&File) -> io::Result<()>) -> io::Result<()> {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        if failed.is_none() {
            *failed = sync(&self.file).err().map(|error| (error.kind(), error.to_string()));
        }
        failed.as_ref().map_or(Ok(()), |(kind, what)| Err(io::Error::new(*kind, what.clone())))
    }
}

/// An output that takes its name only in [`commit`](AtomicFile::commit); dropped before, it leaves nothing.
#[derive(Debug)]
pub struct AtomicFile {
    path: PathBuf,
    partial: PathBuf,
    file: Arc<OpenFile>,
    /// Bytes written since the last ones were sent to the disk.
    waiting: u64,
    /// Brings what was written before to the disk.
    sending: Option<JoinHandle<()>>,
    /// What is dropped without its name stays under the other one.
    stays: bool,
}

impl AtomicFile {
    /// Begins to write `path`.
    ///
    /// # Errors
    /// [`Error::Exists`] unless `overwrite`; [`Error::File`] for a missing or unwritable folder, or when
    /// another process is writing the same output.
    pub fn create(path: &Path, overwrite: bool) -> Result<Self> {
        Self::take_up(path, overwrite)?.anew()
    }

    /// The same; none where another process is writing it.
    pub fn create_alone(path: &Path, overwrite: bool) -> Result<Option<Self>> {
        Self::lock(path, overwrite)?.ok().map(Self::anew).transpose()
    }

    /// Goes on with what a writer that was stopped has left, or begins; what was there stays until it is
    /// [`cut`](Self::cut).
    ///
    /// # Errors
    /// As [`create`](Self::create).
    pub fn take_up(path: &Path, overwrite: bool) -> Result<Self> {
        Self::lock(path, overwrite)?.map_err(|who| {
            let (who, partial) = (who.map_or_else(String::new, |pid| format!("process {pid}, ")), partial_path(path));
            let what =
                format!("another process is writing it ({who}{}); expected to be its only writer", partial.display());
            Error::File { path: path.into(), what }
        })
    }

    /// The locked file; or who has locked it, where the system tells.
    fn lock(path: &Path, overwrite: bool) -> Result<Result<Self, Option<u32>>> {
        check_output(path, overwrite)?;
        let partial = partial_path(path);
        if fs::symlink_metadata(&partial).is_ok_and(|found| !found.is_file()) {
            let what = "is no ordinary file; expected to write the output there first".into();
            return Err(Error::File { path: partial, what });
        }
        let file = loop {
            let opened = OpenOptions::new().write(true).create(true).truncate(false).open(&partial);
            let file = opened.map_err(|e| Error::io(path, &e))?;
            match file.try_lock() {
                // Another writer may have finished in between: then what was opened bears the output's name by now.
                Ok(()) if is_at(&file, &partial) => break file,
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(Err(holder(&file))),
                Err(TryLockError::Error(e)) => return Err(Error::io(path, &e)),
            }
        };
        let stays = file.metadata().is_ok_and(|found| found.len() > 0);
        let file = Arc::new(OpenFile::new(file));
        let this = Self { path: path.into(), partial, file, waiting: 0, sending: None, stays };
        // Only now can nobody else finish.
        check_output(path, overwrite)?;
        Ok(Ok(this))
    }

    /// Drops what a killed writer left behind.
    fn anew(mut self) -> Result<Self> {
        self.stays = false;
        self.cut(0)?;
        Ok(self)
    }

    /// Goes on behind so many bytes; what stands behind them is dropped.
    pub fn cut(&mut self, len: u64) -> Result<()> {
        let mut file = &self.file.file;
        let cut = file.set_len(len).and_then(|()| file.seek(SeekFrom::Start(len)));
        cut.map(drop).map_err(|e| Error::io(&self.path, &e))
    }

    /// Whether it stays under the name that it has while it is written, where it is dropped before it is complete.
    pub fn stay(&mut self, stays: bool) {
        self.stays = stays;
    }

    /// What it is called while it is written.
    pub fn partial(&self) -> &Path {
        &self.partial
    }

    /// The open file, and so its lock, for others to bring to the disk.
    pub fn handle(&self) -> Arc<OpenFile> {
        self.file.clone()
    }

    /// Appends bytes.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        (&self.file.file).write_all(bytes).map_err(|e| Error::io(&self.path, &e))?;
        self.waiting += bytes.len() as u64;
        if self.waiting >= SENT_TOGETHER && self.sending.as_ref().is_none_or(JoinHandle::is_finished) {
            self.waiting = 0;
            let file = self.handle();
            // An error is told to whoever syncs last, and so it is where there is no thread to be had.
            self.sending = thread::Builder::new().spawn(move || drop(file.sync())).ok();
        }
        Ok(())
    }

    /// Replaces the bytes at the beginning.
    pub fn write_head(&mut self, bytes: &[u8]) -> Result<()> {
        let mut file = &self.file.file;
        let written = file
            .seek(SeekFrom::Start(0))
            .and_then(|_| file.write_all(bytes))
            .and_then(|()| file.seek(SeekFrom::End(0)));
        written.map(drop).map_err(|e| Error::io(&self.path, &e))
    }

    /// Brings what was written to the disk.
    pub fn sync(&self) -> Result<()> {
        self.file.sync().map_err(|e| Error::io(&self.path, &e))
    }

    /// Makes it durable under its name.
    pub fn commit(self) -> Result<()> {
        self.commit_and_hold().map(drop)
    }

    /// The same; the file stays locked as long as what is returned lives.
    pub fn commit_and_hold(mut self) -> Result<File> {
        let renamed = self.file.sync().and_then(|()| fs::rename(&self.partial, &self.path));
        renamed.and_then(|()| sync_folder(&self.path)).map_err(|e| Error::io(&self.path, &e))?;
        self.stays = true;
        self.file.file.try_clone().map_err(|e| Error::io(&self.path, &e))
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if !self.stays {
            // Nothing more can be done about a failure here; the next writer takes the name over.
            let _ = fs::remove_file(&self.partial);
        }
        // Its thread holds the lock, which the next writer asks for; its error was told to whoever synced.
        if let Some(sending) = self.sending.take() {
            let _ = sending.join();
        }
    }
}

/// What a file is called while it is written.
pub fn partial_path(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.partial"))
}

/// Gives a complete file, which is on the disk, its name.
pub fn name_partial(path: &Path) -> Result<()> {
    let renamed = fs::rename(partial_path(path), path).and_then(|()| sync_folder(path));
    renamed.map_err(|e| Error::io(path, &e))
}

/// Who has locked a file, where the system tells.
fn holder(file: &File) -> Option<u32> {
    #[cfg(target_os = "linux")]
    {
        use std::os::unix::fs::MetadataExt;
        let inode = file.metadata().ok()?.ino();
        // 1: FLOCK  ADVISORY  WRITE 4711 fe:01:1234567 0 EOF
        let locks = fs::read_to_string("/proc/locks").ok()?;
        let of_file = |line: &&str| {
            let place = line.split_whitespace().nth(5).and_then(|place| place.rsplit(':').next());
            line.contains("FLOCK") && place.is_some_and(|found| found.parse() == Ok(inode))
        };
        locks.lines().find(of_file)?.split_whitespace().nth(4)?.parse().ok().filter(|&pid| pid > 0)
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = file;
        None
    }
}

/// Refuses an output before any work is done for it.
pub fn check_output(path: &Path, overwrite: bool) -> Result<()> {
    let folder = folder_of(path);
    if !folder.is_dir() {
        return Err(Error::File {
            path: folder.into(),
            what: format!("no such folder; expected the folder of {}", path.display()),
        });
    }
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => {
            Err(Error::File { path: path.into(), what: "is a directory; expected the name of an output file".into() })
        }
        Ok(_) if !overwrite => Err(Error::Exists(path.into())),
        Ok(_) if fs::metadata(path).is_ok_and(|found| !found.is_file()) => Err(Error::File {
            path: path.into(),
            what: "is a pipe or a device; expected the name of an output file".into(),
        }),
        _ => Ok(()),
    }
}

/// Writes a small file whole.
pub fn write_file(path: &Path, bytes: &[u8], overwrite: bool) -> Result<()> {
    let mut file = AtomicFile::create(path, overwrite)?;
    file.write(bytes)?;
    file.commit()
}

/// Locks the file at `path`, where there is one, as long as what is returned lives.
///
/// # Errors
/// What `taken` says, where another process holds it.
pub fn hold(path: &Path, taken: impl FnOnce() -> Error) -> Result<Option<File>> {
    loop {
        // For writing too, though nobody does: over NFS such a lock takes the right to write.
        let file = match OpenOptions::new().read(true).write(true).open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(|e| Error::io(path, &e))?,
        };
        match file.try_lock() {
            // Its holder may have put another file there in between.
            Ok(()) if is_at(&file, path) => return Ok(Some(file)),
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(taken()),
            Err(TryLockError::Error(e)) => return Err(Error::io(path, &e)),
        }
    }
}

/// Whether an open file is still the one at `path`.
#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let identity = |m: &fs::Metadata| (m.dev(), m.ino());
    matches!((file.metadata(), fs::metadata(path)), (Ok(ref a), Ok(ref b)) if identity(a) == identity(b))
}

/// Elsewhere an open file cannot be renamed.
#[cfg(not(unix))]
fn is_at(_file: &File, _path: &Path) -> bool {
    true
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn sync_folder(path: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(folder_of(path))?.sync_all() } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_held_with_the_right_to_write() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        let taken = || Error::Interrupted;
        assert!(hold(&path, taken).unwrap().is_none());
        write_file(&path, b"run", false).unwrap();
        let held = hold(&path, taken).unwrap().unwrap();
        held.set_len(3).unwrap();
        assert!(matches!(hold(&path, taken), Err(Error::Interrupted)));
        assert_eq!(fs::read(&path).unwrap(), b"run");
    }

    #[test]
    fn an_error_of_the_disk_is_told_to_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        let mut file = AtomicFile::create(&path, false).unwrap();
        file.write(b"lost").unwrap();
        let (one, other) = (file.handle(), file.handle());
        assert!(one.sync().is_ok());
        let lost = |_: &File| Err(io::Error::from_raw_os_error(5));
        assert!(one.synced_by(lost).is_err());
        for told in [one.sync(), other.sync()] {
            assert!(told.unwrap_err().to_string().contains("os error 5"));
        }
        assert!(file.sync().is_err() && file.commit().is_err());
        assert!(!path.exists() && fs::read_dir(folder.path()).unwrap().next().is_none());
    }

    #[test]
    fn what_is_large_is_sent_while_it_is_written_and_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        let block: Vec<u8> = (0..3 << 20).map(|n: u32| n as u8).collect();
        let mut file = AtomicFile::create(&path, false).unwrap();
        (0..9).for_each(|_| file.write(&block).unwrap());
        assert!(file.sending.is_some());
        file.write_head(b"head").unwrap();
        file.commit().unwrap();
        let mut expected = block.repeat(9);
        expected[..4].copy_from_slice(b"head");
        assert!(fs::read(&path).unwrap() == expected);
        // One that is dropped leaves neither a file nor its lock.
        let mut file = AtomicFile::create(&path, true).unwrap();
        (0..4).for_each(|_| file.write(&block).unwrap());
        drop(file);
        drop(AtomicFile::create(&path, true).unwrap());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_writer_that_comes_behind_another_one_replaces_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        let mut first = AtomicFile::create_alone(&path, false).unwrap().unwrap();
        assert!(AtomicFile::create_alone(&path, false).unwrap().is_none());
        first.write(b"first").unwrap();
        first.commit().unwrap();
        assert!(matches!(AtomicFile::create_alone(&path, false), Err(Error::Exists(_))));
    }
}
