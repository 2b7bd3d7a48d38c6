//! A run from its beginning, or from where another one was stopped, to the names of its files.
//!
//! In: a [`Job`]. Out: complete files. Called by `corpus`; `chunks` does the work in between.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;
use std::thread;

use twox_hash::xxhash3_128::Hasher as Xxh3;

use super::chunks::{Encoded, Output, snapshot};
use super::file::{FileState, Layout, file_name};
use super::lengths::Known;
use super::outlet::Outlet;
use super::part::{Cut, Stretch};
use super::resume::{self, Place, Saver};
use super::{EncodeOptions, Job};
use crate::checkpoint::Setting;
use crate::encode::Packed;
use crate::error::{Error, Result};
use crate::input::{Chunk, ChunkReader, Position};
use crate::progress::Progress;
use crate::sources::DEFAULT_FIELD;
use crate::tokens::{Manifest, PartOf, SplitOf, checksum_text};
use crate::turns::Turns;

/// Settings that a part's manifest does not tell otherwise.
const SHARED_BY_PARTS: [&str; 4] = ["append_eot", "errors", "field", "sample"];

/// A chunk and what has become of it.
struct Part {
    chunk: Chunk,
    done: Encoded,
}

fn shown<T: Debug>(value: Option<&T>) -> String {
    value.map_or_else(|| "none".into(), |value| format!("{value:?}"))
}

impl Job<'_> {
    /// All that decides what is written.
    pub(super) fn settings(&self) -> Vec<Setting> {
        let EncodeOptions {
            append_eot, policy, chunk_bytes, shard_tokens, max_tokens, split, seed, index, part, ..
        } = self.options;
        let spec = self.inputs.spec();
        let mut settings: Vec<_> = [
            ("tokenizer", self.encoder.hash().to_string()),
            ("dtype", format!("{:?}", self.dtype)),
            ("append_eot", shown(append_eot.as_ref())),
            ("errors", policy.name().into()),
            ("shard_tokens", shown(shard_tokens.as_ref())),
            ("max_tokens", shown(max_tokens.as_ref())),
            ("split", format!("{split:?}")),
            ("seed", seed.to_string()),
            ("index", index.to_string()),
            ("part", format!("{part:?}")),
            ("field", spec.field.clone().unwrap_or_else(|| DEFAULT_FIELD.into())),
            ("limit_bytes", shown(spec.limit_bytes.as_ref())),
            ("sample", spec.sample.map_or_else(|| "none".into(), |share| format!("{share} of seed {}", spec.seed))),
            ("chunk_bytes", chunk_bytes.to_string()),
            ("version of bytekiln", env!("CARGO_PKG_VERSION").into()),
        ]
        .map(|(name, value)| (name.to_string(), value))
        .into();
        settings.extend(self.versions.iter().enumerate().map(|(n, found)| (format!("input {}", n + 1), found.clone())));
        settings
    }

    /// The outputs, which are this process's own from here on, and how far an earlier run has come.
    pub(super) fn take_up(
        &self,
        paths: &[PathBuf],
        state: &Path,
        settings: &[Setting],
    ) -> Result<(Vec<Outlet>, Option<Place>)> {
        let EncodeOptions { shard_tokens, index, overwrite, .. } = *self.options;
        let layout = Layout { dtype: self.dtype, shard_tokens, index, overwrite };
        let lock = || paths.iter().map(|path| Outlet::lock(path.clone(), layout)).collect::<Result<Vec<_>>>();
        let mut outlets = lock()?;
        let begin = |outlets: &mut [Outlet]| -> Result<Option<Place>> {
            let Some(place) = resume::read(state, settings)? else { return Ok(None) };
            for (outlet, kept) in outlets.iter_mut().zip(&place.outlets) {
                outlet.begin(Some(kept.clone()))?;
            }
            Ok(Some(place))
        };
        match begin(&mut outlets) {
            Ok(Some(place)) => return Ok((outlets, Some(place))),
            Ok(None) => {}
            Err(error) if !overwrite => return Err(error),
            Err(_) => {
                drop(outlets);
                outlets = lock()?;
                let files = resume::most_files(state);
                for outlet in &outlets {
                    outlet.clear(files);
                }
            }
        }
        outlets.iter().try_for_each(Outlet::check)?;
        resume::remove(state);
        outlets.iter_mut().try_for_each(|outlet| outlet.begin(None))?;
        Ok((outlets, None))
    }

    /// Encodes all that is left.
    pub(super) fn run(
        &self,
        outlets: Vec<Outlet>,
        at: Place,
        saver: Option<&Saver>,
        progress: &Progress,
    ) -> Result<(Vec<Outlet>, Place)> {
        let read: u64 = at.sources.iter().map(|source| source.bytes).sum();
        let room = self.inputs.spec().limit_bytes.map(|limit| limit.saturating_sub(read));
        let offset = if at.file == self.stretch.start.0 { self.stretch.start.1 } else { 0 };
        let reader = ChunkReader::new(self.inputs, self.encoder.splitter(), self.options.chunk_bytes)
            .up_to(self.stretch.end.0 + usize::from(self.stretch.end.1 > 0))
            .stopped_by(progress)
            .starting_at(Position { file: at.file, offset, room });
        let before = Stretch { start: self.stretch.start, end: (at.file, offset) };
        progress.add(before.bytes(self.inputs));
        let file_hash = self.pass_over(&reader, &at, progress)?;
        let passed = at.chunks;
        let (sender, receiver) = Saver::channel();
        let (result, mut output) = thread::scope(|scope| {
            let saving = saver.map(|saver| {
                scope.spawn(move || saver.work(&receiver));
                (saver, sender)
            });
            let files = outlets.iter().map(Outlet::files).sum();
            let output = Output { at, file_hash, outlets, saving, files, clean: true };
            let room = || {
                let ids = Packed::new(self.dtype);
                let done = Encoded { cut: Cut::Whole, ids, known: Known::default(), ends: Vec::new() };
                Part { chunk: Chunk::default(), done }
            };
            let output = Turns::new(output, self.options.threads);
            let result = output.work(self.options.threads, || {
                let mut part = room();
                while !self.full.load(Relaxed) && reader.next(&mut part.chunk)? {
                    progress.check()?;
                    let Part { chunk, done } = &mut part;
                    let Some(cut) = self.stretch.cut(chunk) else { return Ok(()) };
                    done.cut = cut;
                    self.encode(chunk, reader.splitter(chunk), done)?;
                    let number = chunk.index - passed;
                    output.bring(number, &mut part, room, |output, Part { chunk, done }| {
                        self.write(chunk, done, output)?;
                        progress.add(chunk.read_bytes);
                        Ok(())
                    })?;
                }
                Ok(())
            });
            // Nobody hands over states any more: the thread that writes them ends with this.
            let output = output.into_inner().map(|mut output| {
                output.saving = None;
                output
            });
            (result.and_then(|()| progress.check()), output)
        });
        let finished = match &mut output {
            Ok(output) => result.and_then(|()| self.finish(output)),
            Err(_) => result,
        };
        let output = output?;
        let Output { mut outlets, at, .. } = output;
        if let Err(error) = finished {
            leave(&mut outlets, output.clean.then_some(at), &output.file_hash, &error, saver);
            return Err(error);
        }
        Ok((outlets, at))
    }

    /// Reads the chunks of the first file that are encoded already, which must be what they were.
    pub(super) fn pass_over(&self, reader: &ChunkReader<'_>, at: &Place, progress: &Progress) -> Result<Xxh3> {
        let (mut hash, mut bytes, mut chunk) = (Xxh3::new(), 0, Chunk::default());
        for _ in 0..at.chunks {
            progress.check()?;
            if !reader.next(&mut chunk)? {
                break;
            }
            hash.write(&chunk.bytes);
            bytes += chunk.bytes.len() as u64;
            progress.add(chunk.read_bytes);
        }
        if at.chunks > 0 && (bytes, checksum_text(&hash)) != (at.file_bytes, at.file_checksum.clone()) {
            self.stale.store(true, Relaxed);
            let path = self.inputs.paths().nth(at.file).unwrap_or_else(|| Path::new(""));
            return Err(Error::format(
                path.display().to_string(),
                format!(
                    "its first {} bytes of text are not those that an unfinished run has encoded; expected them unchanged, \
                     another output, or --overwrite to begin anew",
                    at.file_bytes
                ),
            ));
        }
        Ok(hash)
    }

    pub(super) fn finish(&self, output: &mut Output<'_>) -> Result<()> {
        output.at.finished = true;
        output.clean = false;
        output.outlets.iter_mut().try_for_each(Outlet::finish)?;
        // Nothing reads a file of no ids. One of many processes may well have no document for it.
        let empty = output.outlets.iter().position(|outlet| outlet.last().tokens == 0);
        if let (Some(empty), true, None) = (empty, self.shares.is_split(), self.options.part) {
            let path = output.outlets[empty].path.display();
            return Err(Error::Config(format!(
                "split: no document fell to {path}; expected more documents, another share or another seed"
            )));
        }
        Ok(())
    }

    /// Gives all files their names.
    pub(super) fn name_files(
        &self,
        outlets: &mut [Outlet],
        place: &Place,
        saver: Option<&Saver>,
    ) -> Result<Vec<(PathBuf, Manifest)>> {
        let several = outlets.len() > 1 || self.options.shard_tokens.is_some() || self.options.index;
        let (place, files) = snapshot(outlets, place, &Xxh3::new())?;
        let synced = match saver {
            // Between two names the next run goes on.
            Some(saver) if several || saver.is_there() => saver.save((place.clone(), files)),
            _ => {
                let path = &outlets[0].path;
                files.iter().try_for_each(|file| file.sync().map_err(|e| Error::io(path, &e)))
            }
        };
        if let Err(error) = synced {
            leave(outlets, None, &Xxh3::new(), &error, saver);
            return Err(error);
        }
        let mut made = Vec::new();
        let shared_by_parts: BTreeMap<_, _> =
            self.settings().into_iter().filter(|(name, _)| SHARED_BY_PARTS.contains(&name.as_str())).collect();
        for n in 0..outlets.len() {
            let EncodeOptions { split, seed, part, .. } = self.options;
            let split = self.shares.is_split().then(|| SplitOf {
                part: n.checked_sub(1).map(|n| split[n].0.clone()),
                shares: split.clone(),
                seed: *seed,
            });
            let last = outlets[n].last();
            let describe = |path: &Path, file: &FileState| Manifest {
                format: "bytekiln-tokens".into(),
                version: 1,
                file: file_name(path),
                dtype: self.dtype,
                tokens: file.tokens,
                documents: file.documents,
                text_bytes: file.text_bytes,
                vocab_size: self.encoder.vocab().len(),
                eot_id: self.eot,
                max_id: file.max_id,
                tokenizer_hash: self.encoder.hash().into(),
                checksum: file.checksum.clone(),
                sources: place.sources.clone(),
                document_ends: None,
                shards: Vec::new(),
                shard: None,
                split: split.clone(),
                part: part.map(|(number, of)| {
                    let settings = shared_by_parts.clone();
                    PartOf { number, of, open: last.open, tail: last.tail, settings }
                }),
                created_by: concat!("bytekiln ", env!("CARGO_PKG_VERSION")).into(),
            };
            match outlets[n].name_files(&describe) {
                Ok(named) => made.extend(named),
                Err(error) => {
                    if !saver.is_some_and(Saver::is_there) {
                        for outlet in outlets.iter_mut() {
                            outlet.stay(false);
                        }
                    }
                    return Err(error);
                }
            }
        }
        if let Some(saver) = saver {
            saver.remove();
        }
        Ok(made)
    }
}

/// A run that failed: what the next one can go on with stays, and nothing else does.
fn leave(outlets: &mut [Outlet], at: Option<Place>, hash: &Xxh3, error: &Error, saver: Option<&Saver>) {
    let stays = saver.is_some_and(|saver| match (error, at) {
        (Error::Interrupted, Some(at)) if saver.is_worth_it() => {
            let kept = snapshot(outlets, &at, hash).and_then(|snapshot| saver.save(snapshot));
            kept.is_ok() || saver.is_there()
        }
        (Error::Interrupted | Error::File { .. } | Error::Memory(_), _) => saver.is_there(),
        _ => false,
    });
    for outlet in outlets.iter_mut() {
        outlet.stay(stays);
    }
    if let (Some(saver), false) = (saver, stays) {
        saver.remove();
    }
}
