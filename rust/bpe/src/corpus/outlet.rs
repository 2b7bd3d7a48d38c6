//! Where ids go: one file, or shards.
//!
//! In: ids in order, with what is known of them. Out: complete files, which get their names when all is done. Called by
//! `chunks` and `run`; `resume` keeps the [`OutletState`].

use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::file::{FileState, Layout, Writer, damaged, ends_path, file_name, head_of, with_word};
use super::lengths::{Known, Lengths};
use crate::atomic::{AtomicFile, OpenFile, check_output, name_partial, partial_path, write_file};
use crate::error::{Error, Result};
use crate::tokens::{
    DocumentEnds, Manifest, Shard, ShardOf, checksum_of_file, is_orphan, manifest_path, read_manifest,
};

/// Complete files that wait to be brought to the disk; a process may not have many open.
const MOST_UNSYNCED: usize = 32;

/// Where the ids of some documents go: one file, or shards.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct OutletState {
    pub done: Vec<FileState>,
    pub current: Option<FileState>,
}

/// Where the ids of some documents go.
pub(super) struct Outlet {
    pub path: PathBuf,
    layout: Layout,
    /// Locked under the name of all; holds the ids where they are not divided.
    base: Option<AtomicFile>,
    /// The same lock once the ids are complete.
    held: Option<Arc<OpenFile>>,
    file: Option<Writer>,
    done: Vec<FileState>,
    /// Complete files that may not be on the disk yet.
    unsynced: Vec<Arc<OpenFile>>,
}

impl Outlet {
    /// Makes it this process's own; changes nothing that is there.
    pub fn lock(path: PathBuf, layout: Layout) -> Result<Self> {
        if let Ok(to) = fs::read_link(&path) {
            let what = format!("is a symbolic link to {}; expected a file's own name to write", to.display());
            return Err(Error::File { path, what });
        }
        let base = Some(AtomicFile::take_up(&path, true)?);
        Ok(Self { path, layout, base, held: None, file: None, done: Vec::new(), unsynced: Vec::new() })
    }

    /// Refuses to write over what is there.
    pub fn check(&self) -> Result<()> {
        let Layout { overwrite, index, .. } = self.layout;
        let first = self.name(0);
        for path in [&self.path, &first] {
            check_output(path, overwrite)?;
            check_output(&manifest_path(path), overwrite || is_orphan(path))?;
            if index {
                check_output(&ends_path(path), overwrite || is_orphan(path))?;
            }
        }
        Ok(())
    }

    /// Begins, or goes on behind what was done; complete files are checked, not made again.
    pub fn begin(&mut self, state: Option<OutletState>) -> Result<()> {
        let Some(OutletState { done, current }) = state else {
            match (&mut self.base, self.layout.shard_tokens) {
                (Some(base), Some(_)) => {
                    base.cut(0)?;
                    base.stay(false);
                }
                _ => drop(self.open(None)?),
            }
            return Ok(());
        };
        for (number, file) in done.iter().enumerate() {
            let path = self.name(number);
            let there = if self.is_unnamed(&path, file) { partial_path(&path) } else { path.clone() };
            let (head, len) = (head_of(&path), self.bytes(&path, file));
            let found = fs::metadata(&there).map_or(0, |m| m.len());
            if found != len || checksum_of_file(&there, head)? != file.checksum {
                return Err(damaged(&there, found, len));
            }
        }
        self.done = done;
        if current.is_some() {
            self.open(current)?;
        }
        Ok(())
    }

    /// Removes what an unfinished run with so many files has left under names that this one does not use.
    pub fn clear(&self, files: usize) {
        for number in 0..=files {
            let path = with_word(&self.path, &format!("{number:05}"));
            // What stays is found by whoever writes a file of that name, and is no output.
            let _ = fs::remove_file(partial_path(&path));
            let _ = fs::remove_file(partial_path(&ends_path(&path)));
        }
        let _ = fs::remove_file(partial_path(&ends_path(&self.path)));
    }

    fn bytes(&self, path: &Path, file: &FileState) -> u64 {
        head_of(path) + file.tokens * self.layout.dtype.size() as u64
    }

    /// Whether a complete file has not got its name yet. Under its other one there may be a lock, too.
    fn is_unnamed(&self, path: &Path, file: &FileState) -> bool {
        fs::metadata(partial_path(path)).is_ok_and(|found| found.len() == self.bytes(path, file))
    }

    fn name(&self, number: usize) -> PathBuf {
        match self.layout.shard_tokens {
            Some(_) => with_word(&self.path, &format!("{number:05}")),
            None => self.path.clone(),
        }
    }

    fn open(&mut self, state: Option<FileState>) -> Result<&mut Writer> {
        let path = self.name(self.done.len());
        let Layout { shard_tokens, overwrite, .. } = self.layout;
        let file = match self.base.take() {
            Some(base) if shard_tokens.is_none() => base,
            base => {
                self.base = base;
                check_output(&manifest_path(&path), overwrite || is_orphan(&path))?;
                AtomicFile::take_up(&path, overwrite)?
            }
        };
        Ok(self.file.insert(Writer::open(file, &path, self.layout, state)?))
    }

    /// Appends a stretch of a chunk's ids; `ends` are those in it, `known` where it has been measured already.
    pub fn append(
        &mut self,
        ids: &[u8],
        mut stretch: Range<usize>,
        mut ends: &[usize],
        known: Option<Known>,
        lengths: Option<&Lengths>,
    ) -> Result<()> {
        let size = self.layout.dtype.size();
        let whole = stretch.clone();
        // Documents without ids end where there is nothing to write.
        let mut left = !stretch.is_empty() || !ends.is_empty() || known.is_some_and(|known| known.documents > 0);
        while left {
            let most = self.layout.shard_tokens.unwrap_or(u64::MAX);
            if !stretch.is_empty() && self.file.as_ref().is_some_and(|file| file.state.tokens >= most) {
                self.finish_file()?;
            }
            let file = match &mut self.file {
                Some(file) => file,
                None => self.open(None)?,
            };
            let room = usize::try_from(most - file.state.tokens).unwrap_or(usize::MAX);
            let part = stretch.start..stretch.end.min(stretch.start.saturating_add(room));
            let part_ends = ends.split_off(..ends.partition_point(|&end| end <= part.end)).unwrap_or_default();
            let known = match (known, lengths) {
                (Some(known), _) if part == whole => known,
                (_, Some(lengths)) => lengths.measure(ids, &part, part_ends),
                (known, None) => known.unwrap_or_default(),
            };
            let places = part_ends.iter().map(|&end| (end - part.start) as u64);
            file.append(&ids[part.start * size..part.end * size], known, places)?;
            stretch.start = part.end;
            left = !stretch.is_empty() || !ends.is_empty();
        }
        Ok(())
    }

    /// A document ends behind the last id.
    pub fn end_document(&mut self) -> Result<()> {
        self.file.as_mut().map_or(Ok(()), Writer::end_document)
    }

    /// The last file, once it is complete.
    pub fn last(&self) -> FileState {
        self.done.last().cloned().unwrap_or_default()
    }

    /// Number of complete files.
    pub fn files(&self) -> usize {
        self.done.len()
    }

    fn finish_file(&mut self) -> Result<()> {
        if let Some(file) = self.file.take() {
            if self.layout.shard_tokens.is_none() {
                self.held = Some(file.file.handle());
            }
            let (state, handles) = file.finish()?;
            self.done.push(state);
            self.unsynced.extend(handles);
            if self.unsynced.len() > MOST_UNSYNCED {
                let synced = self.unsynced.drain(..).try_for_each(|file| file.sync());
                synced.map_err(|e| Error::io(&self.path, &e))?;
            }
        }
        Ok(())
    }

    /// How far it is, and the files that must be on the disk before anybody relies on that.
    pub fn state(&mut self) -> Result<(OutletState, Vec<Arc<OpenFile>>)> {
        let current = self.file.as_mut().map(Writer::state).transpose()?;
        let mut handles = std::mem::take(&mut self.unsynced);
        if let Some(file) = &self.file {
            handles.extend(file.handles());
        }
        Ok((OutletState { done: self.done.clone(), current }, handles))
    }

    /// Completes the last file, and the first where there are no ids.
    pub fn finish(&mut self) -> Result<()> {
        if self.done.is_empty() && self.file.is_none() {
            self.open(None)?;
        }
        self.finish_file()
    }

    /// Whether files stay under their temporary names when this is dropped.
    pub fn stay(&mut self, stays: bool) {
        if let Some(file) = &mut self.file {
            file.stay(stays);
        }
        if let (Some(base), None) = (&mut self.base, self.layout.shard_tokens) {
            base.stay(stays);
        }
        if !stays {
            for number in 0..self.done.len() {
                // As by an unfinished file that is dropped: what fails here, the next writer takes over.
                let _ = fs::remove_file(partial_path(&self.name(number)));
                let _ = fs::remove_file(partial_path(&ends_path(&self.name(number))));
            }
        }
    }

    /// Gives all files, which are on the disk, their names; each behind that of its manifest. May be done again from any
    /// point. `describe` makes a manifest of what a file holds.
    pub fn name_files(&mut self, describe: &dyn Fn(&Path, &FileState) -> Manifest) -> Result<Vec<(PathBuf, Manifest)>> {
        let Layout { shard_tokens, overwrite, index, .. } = self.layout;
        let old = read_manifest(&self.path);
        let mut made = Vec::new();
        for (number, file) in self.done.iter().enumerate() {
            let path = self.name(number);
            let mut manifest = describe(&path, file);
            if index && file.documents > 0 {
                let checksum = file.ends_checksum.clone();
                manifest.document_ends = Some(DocumentEnds { file: file_name(&ends_path(&path)), checksum });
            }
            if shard_tokens.is_some() {
                manifest.sources.clear();
                manifest.shard = Some(ShardOf { number: number as u64, of: file_name(&self.path) });
            }
            if self.is_unnamed(&path, file) {
                let json = manifest.to_json()? + "\n";
                write_file(&manifest_path(&path), json.as_bytes(), overwrite || is_orphan(&path))?;
                let named = self.name_ends(&path, file).and_then(|()| {
                    check_output(&path, overwrite)?;
                    name_partial(&path)
                });
                if let Err(error) = named {
                    if !overwrite {
                        // Without the ids it describes nothing. The error that matters is the one above.
                        let _ = fs::remove_file(manifest_path(&path));
                    }
                    return Err(error);
                }
            }
            made.push((path, manifest));
        }
        if shard_tokens.is_some() {
            let shard = |(_, manifest): &(PathBuf, Manifest)| {
                let Manifest { file, tokens, checksum, .. } = manifest.clone();
                Shard { file, tokens, checksum }
            };
            // A document that goes on in the next shard is counted there.
            let all = self.done.iter().fold(FileState::default(), |all, file| FileState {
                tokens: all.tokens + file.tokens,
                documents: all.documents - u64::from(all.open) + file.documents,
                open: file.open,
                text_bytes: all.text_bytes + file.text_bytes,
                max_id: all.max_id.max(file.max_id),
                ..all
            });
            let summary = Manifest { shards: made.iter().map(shard).collect(), ..describe(&self.path, &all) };
            let json = summary.to_json()? + "\n";
            write_file(&manifest_path(&self.path), json.as_bytes(), true)?;
            made.insert(0, (self.path.clone(), summary));
        }
        // Shards of an output that was replaced and had more of them, or none.
        let written: Vec<_> = (0..self.done.len()).map(|number| file_name(&self.name(number))).collect();
        let old = old.filter(|_| overwrite).map_or(Vec::new(), |old| {
            let shards: Vec<_> = old.shards.into_iter().map(|shard| shard.file).collect();
            if shards.is_empty() { vec![old.file] } else { shards }
        });
        for name in old.into_iter().filter(|name| !written.contains(name) && !name.contains('/')) {
            let path = self.path.with_file_name(&name);
            remove(&path)?;
            remove(&ends_path(&path))?;
            if path != self.path {
                remove(&manifest_path(&path))?;
            }
        }
        Ok(made)
    }

    fn name_ends(&self, path: &Path, file: &FileState) -> Result<()> {
        let (ends, partial) = (ends_path(path), partial_path(&ends_path(path)));
        if !self.layout.index {
            // Those of an output that is replaced would be of other documents.
            return if self.layout.overwrite { remove(&ends) } else { Ok(()) };
        }
        match (partial.exists(), file.documents > 0) {
            (true, true) => name_partial(&ends),
            (true, false) => remove(&partial),
            (false, _) => Ok(()),
        }
    }
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io(path, &error)),
        _ => Ok(()),
    }
}
