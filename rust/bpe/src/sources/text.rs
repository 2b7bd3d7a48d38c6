//! A text file → chunks that end at certain borders between pre-tokens.
//!
//! In: a [`Stream`] of text, of which a sample may drop whole documents: what stands between two end-of-text
//! tokens, or the whole file where there is none. Out: filled chunks. Called by `input`.

use crate::error::{Error, Result};
use crate::input::{Chunk, Place};
use crate::pretokenize::Splitter;
use crate::sources::sample::Sample;
use crate::sources::unpack::Stream;
use crate::sources::{End, Job, Source, last_border, more_memory};

/// Bytes at a time in which ends of documents are looked for.
const BLOCK: usize = 64 << 10;

/// A text file that is being read.
pub(crate) struct Text<'a> {
    stream: Stream<'a>,
    filter: Option<Filter>,
    /// Bytes behind the last cut, with their places.
    rest: Vec<u8>,
    rest_places: Vec<Place>,
    /// Bytes of text handed out, of those that the sample takes.
    handed: u64,
}

impl<'a> Text<'a> {
    /// `sample`: with the file's place in the order of all.
    pub fn new(stream: Stream<'a>, sample: Option<(Sample, usize)>) -> Self {
        let filter = sample.map(|(sample, file)| Filter { sample, file, raw: Vec::new(), offset: 0, document: 0 });
        Self { stream, filter, rest: Vec::new(), rest_places: Vec::new(), handed: 0 }
    }

    fn read_to(&mut self, chunk: &mut Chunk, splitter: &Splitter, wanted: usize) -> Result<bool> {
        let Some(filter) = &mut self.filter else { return self.stream.read_to(&mut chunk.bytes, wanted) };
        while chunk.bytes.len() < wanted {
            let block = (wanted - chunk.bytes.len()).clamp(1, BLOCK) + filter.raw.len();
            let ended = self.stream.read_to(&mut filter.raw, block)?;
            filter.pass(splitter, ended, chunk);
            if ended {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

impl Source for Text<'_> {
    fn fill(&mut self, chunk: &mut Chunk, job: Job<'_>) -> Result<End> {
        chunk.records = false;
        chunk.bytes.clear();
        chunk.bytes.append(&mut self.rest);
        chunk.places.clear();
        chunk.places.append(&mut self.rest_places);
        if chunk.places.is_empty() && self.filter.is_none() {
            chunk.places.push(Place { start: 0, at: self.handed });
        }
        // One byte more than the limit tells whether the text goes on there.
        let most = usize::try_from(job.room).map_or(usize::MAX, |room| room.saturating_add(1));
        let (mut wanted, mut searched) = (job.chunk_bytes.min(most), 0);
        let (cut, end) = loop {
            let ended = self.read_to(chunk, job.splitter, wanted)?;
            if chunk.bytes.len() as u64 > job.room {
                chunk.bytes.truncate(job.room as usize);
                let found = job.splitter.safe_cut(&chunk.bytes);
                // Without one in what is left, the last certain border is where this chunk begins.
                let none = if self.handed > 0 { 0 } else { last_border(&chunk.bytes, job.splitter) };
                break (found.unwrap_or(none), End::Limit);
            }
            if ended {
                break (chunk.bytes.len(), End::File);
            }
            if chunk.bytes.len() > searched {
                searched = chunk.bytes.len();
                if let Some(cut) = job.splitter.safe_cut(&chunk.bytes) {
                    break (cut, End::Open);
                }
            }
            if searched >= job.most_uncut {
                let what = format!(
                    "found no certain border between words in {searched} bytes from byte {}; expected white space \
                     there, or a special token (for a pattern of your own only those are certain){}",
                    chunk.places.first().map_or(0, |place| place.at),
                    more_memory(&job)
                );
                return Err(Error::File { path: self.stream.path().into(), what });
            }
            // No certain border yet: twice as much, so that the searches stay linear in sum.
            wanted = (searched.max(job.chunk_bytes) * 2).min(most).min(job.most_uncut);
        };
        self.rest.extend_from_slice(&chunk.bytes[cut..]);
        chunk.bytes.truncate(cut);
        self.handed += cut as u64;
        if self.filter.is_some() {
            split_places(&mut chunk.places, cut, &mut self.rest_places);
        }
        Ok(end)
    }

    fn used(&self) -> u64 {
        self.stream.used()
    }

    fn position(&self) -> u64 {
        self.handed
    }

    fn skip(&mut self, to: u64, splitter: &Splitter) -> Result<()> {
        if self.filter.is_none() && self.stream.seek(to)? {
            self.handed = to;
            return Ok(());
        }
        let mut chunk = Chunk::default();
        while self.handed < to {
            let wanted = (to - self.handed).min(BLOCK as u64) as usize;
            chunk.bytes.clear();
            chunk.bytes.append(&mut self.rest);
            chunk.places.clear();
            chunk.places.append(&mut self.rest_places);
            let ended = self.read_to(&mut chunk, splitter, wanted)?;
            let cut = wanted.min(chunk.bytes.len());
            self.rest.extend_from_slice(&chunk.bytes[cut..]);
            if self.filter.is_some() {
                split_places(&mut chunk.places, cut, &mut self.rest_places);
            }
            self.handed += cut as u64;
            if ended && self.handed < to && self.rest.is_empty() {
                let what = format!("ends after {} bytes of text; expected {to} that were read before", self.handed);
                return Err(Error::File { path: self.stream.path().into(), what });
            }
        }
        Ok(())
    }
}

/// Takes the places of what lies behind `cut` over to the rest.
fn split_places(places: &mut Vec<Place>, cut: usize, rest: &mut Vec<Place>) {
    let behind = places.partition_point(|place| place.start <= cut);
    if let Some(last) = behind.checked_sub(1).map(|i| places[i]) {
        rest.push(Place { start: 0, at: last.at + (cut - last.start) as u64 });
    }
    rest.extend(places[behind..].iter().map(|place| Place { start: place.start - cut, ..*place }));
    places.truncate(behind);
}

/// Lets the documents of a sample pass and drops the others.
struct Filter {
    sample: Sample,
    file: usize,
    /// Text of which it is not known yet which document it belongs to.
    raw: Vec<u8>,
    /// Where `raw` begins in the file's text.
    offset: u64,
    /// Number of the document there.
    document: u64,
}

impl Filter {
    /// Hands on what is decided; at the end of the text, everything is.
    fn pass(&mut self, splitter: &Splitter, ended: bool, chunk: &mut Chunk) {
        // A longer special token might still begin at the same place as one that is found.
        let decided =
            if ended { self.raw.len() } else { (self.raw.len() + 1).saturating_sub(splitter.longest_special().max(1)) };
        let mut from = 0;
        let mut last = 0;
        for (start, end, is_eot) in splitter.specials_in(&self.raw) {
            if start >= decided && !ended {
                break;
            }
            last = end;
            if is_eot {
                hand_on(&self.raw[from..end], self.offset + from as u64, self.takes(), chunk);
                from = end;
                self.document += 1;
            }
        }
        let to = decided.max(last);
        hand_on(&self.raw[from..to], self.offset + from as u64, self.takes(), chunk);
        self.raw.drain(..to);
        self.offset += to as u64;
    }

    fn takes(&self) -> bool {
        self.sample.takes(self.file, self.document)
    }
}

/// Appends a part of the text that stands at `at`, if it is wanted.
fn hand_on(part: &[u8], at: u64, wanted: bool, chunk: &mut Chunk) {
    if !wanted || part.is_empty() {
        return;
    }
    let start = chunk.bytes.len();
    let follows = chunk.places.last().is_some_and(|last| last.at + (start - last.start) as u64 == at);
    if !follows {
        chunk.places.push(Place { start, at });
    }
    chunk.bytes.extend_from_slice(part);
}
