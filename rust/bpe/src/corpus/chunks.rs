//! A chunk of text → ids in their places.
//!
//! In: chunks, on any thread. Out: their ids, handed on in the order of the text. Called by `run`.

use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::SyncSender;

use twox_hash::xxhash3_128::Hasher as Xxh3;

use super::file::file_name;
use super::lengths::Known;
use super::outlet::Outlet;
use super::part::{self, Cut};
use super::resume::{Place, Saver, Snapshot};
use super::{Job, version};
use crate::encode::{Packed, Take};
use crate::error::{Error, Result};
use crate::input::Chunk;
use crate::pretokenize::{Piece, Run, Splitter};
use crate::tokens::{Source, checksum_text};

/// A chunk after encoding.
pub(super) struct Encoded {
    pub cut: Cut,
    pub ids: Packed,
    pub known: Known,
    /// Where documents end, where anybody asks: one place past the last id of each.
    pub ends: Vec<usize>,
}

/// What is written.
pub(super) struct Output<'a> {
    pub at: Place,
    pub file_hash: Xxh3,
    pub outlets: Vec<Outlet>,
    pub saving: Option<(&'a Saver, SyncSender<Snapshot>)>,
    /// Complete files at the last state.
    pub files: usize,
    /// What `at` says has been written, no more and no less.
    pub clean: bool,
}

impl Job<'_> {
    pub(super) fn encode(&self, chunk: &Chunk, splitter: &Splitter, done: &mut Encoded) -> Result<()> {
        let Encoded { ids, known, ends, .. } = done;
        ids.bytes.clear();
        ends.clear();
        *known = Known::default();
        let end_record = self.eot.filter(|_| chunk.records && self.options.append_eot != Some(false));
        let wants_ends = self.lengths.is_some() || self.options.index;
        if wants_ends && chunk.records && end_record.is_none() {
            // No id tells where these end.
            for (start, text) in chunk.texts() {
                self.encoder.with(ids, |take| self.encode_text(chunk, (start, text), splitter, take, known))?;
                ends.push(ids.len());
            }
        } else {
            self.encoder.with(ids, |take| {
                for (start, text) in chunk.texts() {
                    self.encode_text(chunk, (start, text), splitter, take, known)?;
                    if let Some(eot) = end_record {
                        take.id(eot);
                    }
                }
                Ok(())
            })?;
            if let (true, Some(eot)) = (wants_ends, self.eot) {
                let found = (1..).zip(self.dtype.unpack(&ids.bytes)).filter(|&(_, id)| id == eot);
                ends.extend(found.map(|(end, _)| end));
            }
        }
        if chunk.records {
            (known.documents, known.open) = (chunk.record_count(), false);
        }
        known.max_id = ids.max(0);
        Ok(())
    }

    pub(super) fn encode_text(
        &self,
        chunk: &Chunk,
        (start, text): (usize, &[u8]),
        splitter: &Splitter,
        take: &mut dyn Take,
        known: &mut Known,
    ) -> Result<()> {
        let special_ids = self.encoder.special_ids();
        let mut meet = |words: &[u8], special: Option<usize>| match special {
            None => {
                known.text_bytes += words.len() as u64;
                known.open = known.open || !words.iter().all(u8::is_ascii_whitespace);
            }
            Some(index) if Some(special_ids[index]) == self.eot => {
                known.documents += 1;
                known.open = false;
            }
            Some(_) => known.open = true,
        };
        let split = match simdutf8::basic::from_utf8(text) {
            Ok(valid) => splitter.split_runs(valid, |run| match run {
                Run::Words(ends) => {
                    meet(&text[ends.start..ends.end()], None);
                    take.run(text, &ends);
                }
                Run::Special(index) => {
                    meet(&[], Some(index));
                    take.id(special_ids[index]);
                }
            }),
            Err(_) => splitter.split_bytes(text, self.options.policy, |piece| match piece {
                Piece::Word(word) => {
                    meet(word, None);
                    take.word(word);
                }
                Piece::Special(index) => {
                    meet(&[], Some(index));
                    take.id(special_ids[index]);
                }
            }),
        };
        split.map_err(|e| self.inputs.locate(chunk, start, e))
    }

    /// Writes a chunk in its turn.
    pub(super) fn write(&self, chunk: &Chunk, done: &Encoded, output: &mut Output<'_>) -> Result<()> {
        if self.full.load(Relaxed) {
            return Ok(());
        }
        output.clean = false;
        let (ids, size) = (&*done.ids.bytes, self.dtype.size());
        let count = done.ids.len();
        let room = self.options.max_tokens.map_or(u64::MAX, |most| most - output.at.tokens);
        let taken = usize::try_from(room).map_or(count, |room| room.min(count));
        let ends = &done.ends[..done.ends.partition_point(|&end| end <= taken)];
        let text = match &self.lengths {
            Some(lengths) if taken < count => {
                let bytes = lengths.bytes(&ids[..taken * size], chunk.records) as usize;
                &chunk.bytes[..bytes.min(chunk.bytes.len())]
            }
            _ => &*chunk.bytes,
        };
        self.hand_on(chunk.file, ids, taken, ends, done, output)?;
        output.file_hash.write(text);
        let at = &mut output.at;
        at.chunks += 1;
        at.file_bytes += text.len() as u64;
        at.tokens += taken as u64;
        at.file_ends += done.known.documents;
        at.file_open = done.known.open || (at.file_open && done.known.documents == 0);
        let full = room == taken as u64;
        if full || done.cut == Cut::Last {
            self.full.store(true, Relaxed);
            self.end_source(chunk.file, output, true);
            return Ok(());
        }
        if chunk.ends_file {
            self.end_file(chunk.file, output)?;
            // Where the text ends at a limit, the next file is not the place to go on at.
            if self.inputs.spec().limit_bytes.is_some() {
                return Ok(());
            }
        }
        output.clean = true;
        let files: usize = output.outlets.iter().map(Outlet::files).sum();
        if let Some((saver, sender)) = &output.saving
            && (saver.is_due()? || (files > output.files && saver.is_idle()?))
        {
            output.files = files;
            let snapshot = snapshot(&mut output.outlets, &output.at, &output.file_hash)?;
            saver.hand_over(sender, snapshot)?;
        }
        Ok(())
    }

    /// Ids to the outputs that their documents go into.
    pub(super) fn hand_on(
        &self,
        file: usize,
        ids: &[u8],
        taken: usize,
        ends: &[usize],
        done: &Encoded,
        output: &mut Output<'_>,
    ) -> Result<()> {
        let known = (taken == done.ids.len()).then_some(done.known);
        if !self.shares.is_split() {
            return output.outlets[0].append(ids, 0..taken, ends, known, self.lengths.as_ref());
        }
        let mut number = output.at.file_ends;
        // First id and first end of a stretch of documents that go to the same output.
        let (mut from, mut first, mut to) = (0, 0, self.shares.output(file, number));
        for (n, &end) in (1..).zip(ends) {
            number += 1;
            let next = self.shares.output(file, number);
            if next != to {
                output.outlets[to].append(ids, from..end, &ends[first..n], None, self.lengths.as_ref())?;
                (from, first, to) = (end, n, next);
            }
        }
        let known = known.filter(|_| first == 0);
        output.outlets[to].append(ids, from..taken, &ends[first..], known, self.lengths.as_ref())
    }

    pub(super) fn end_file(&self, file: usize, output: &mut Output<'_>) -> Result<()> {
        let now = version(self.inputs, file)?;
        if now != self.versions[file] && self.inputs.spec().limit_bytes.is_none() {
            let what = format!("changed while it was read: was {}, is {now}; expected it to stay", self.versions[file]);
            let path = self.inputs.paths().nth(file).unwrap_or_else(|| Path::new(""));
            return Err(Error::format(path.display().to_string(), what));
        }
        let at = &mut output.at;
        let (mut ended, number) = (at.file_ends > 0, at.file_ends);
        if file == self.stretch.start.0 && self.stretch.start.1 > 0 && !ended {
            // What another part has read of it decides, too.
            let (there, open) = part::before(self.inputs, self.encoder.splitter(), file, self.stretch.start.1)?;
            ended |= there;
            at.file_open |= open;
        }
        if at.file_open {
            let outlet = &mut output.outlets[self.shares.output(file, number)];
            let append = self.options.append_eot.unwrap_or(ended);
            if let (true, Some(eot)) = (append, self.eot) {
                let mut packed = Vec::new();
                self.dtype.pack(&[eot], &mut packed);
                let known = Known { text_bytes: 0, max_id: Some(eot), documents: 1, open: false };
                outlet.append(&packed, 0..1, &[1], Some(known), self.lengths.as_ref())?;
                at.tokens += 1;
            } else {
                outlet.end_document()?;
            }
        }
        self.end_source(file, output, false);
        let at = &mut output.at;
        (at.file, at.chunks, at.file_ends, at.file_open) = (file + 1, 0, 0, false);
        Ok(())
    }

    /// Notes an input, or as much of it as was read.
    pub(super) fn end_source(&self, file: usize, output: &mut Output<'_>, is_cut: bool) {
        let begins = file == self.stretch.start.0 && self.stretch.start.1 > 0;
        let part = self.options.part.is_some() && (is_cut || begins);
        output.at.sources.push(Source {
            name: self.inputs.paths().nth(file).map(file_name).unwrap_or_default(),
            bytes: std::mem::take(&mut output.at.file_bytes),
            offset: part.then_some(if begins { self.stretch.start.1 } else { 0 }),
            checksum: checksum_text(&output.file_hash),
        });
        output.file_hash = Xxh3::new();
    }
}

/// How far all outputs are.
pub(super) fn snapshot(outlets: &mut [Outlet], at: &Place, hash: &Xxh3) -> Result<Snapshot> {
    let mut files = Vec::new();
    let mut place = Place { file_checksum: checksum_text(hash), outlets: Vec::new(), ..at.clone() };
    for outlet in outlets {
        let (state, handles) = outlet.state()?;
        place.outlets.push(state);
        files.extend(handles);
    }
    Ok((place, files))
}
