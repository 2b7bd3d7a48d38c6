//! Documents that another library reads: parquet through pyarrow, which the binding brings.
//!
//! In: a [`Feed`]. Out: filled chunks. Called by `input`.

use std::path::Path;

use crate::error::{Error, Result};
use crate::input::Chunk;
use crate::pretokenize::Splitter;
use crate::progress::Progress;
use crate::sources::document::Gather;
use crate::sources::sample::Sample;
use crate::sources::{End, Job, Source, more_memory};

/// A column of text that is being read, batch by batch.
pub trait Feed: Send {
    /// Gives the documents of the next batch, in order, to `take`, until that says `false`; `false` at the end. One that
    /// is longer than `most` bytes comes alone, or is refused.
    fn next(&mut self, most: usize, take: &mut dyn FnMut(&[u8]) -> bool) -> Result<bool>;

    /// How much of the file has been read, 0 to 1.
    fn share_done(&self) -> f64;
}

/// Opens a column of a file by its name.
pub type OpenFeed = dyn Fn(&Path, &str) -> Result<Box<dyn Feed>> + Send + Sync;

/// A feed as a source.
pub(crate) struct FeedSource<'a> {
    feed: Box<dyn Feed>,
    path: &'a Path,
    progress: Option<&'a Progress>,
    sample: Option<Sample>,
    size: u64,
    /// Rows that were read.
    rows: u64,
    /// Rows that were handed out; those before are passed over.
    handed: u64,
}

impl<'a> FeedSource<'a> {
    /// `path`: what the file is called in messages; `size`: its bytes.
    pub fn new(
        feed: Box<dyn Feed>,
        (path, size): (&'a Path, u64),
        sample: Option<Sample>,
        progress: Option<&'a Progress>,
    ) -> Self {
        Self { feed, path, progress, sample, size, rows: 0, handed: 0 }
    }
}

impl Source for FeedSource<'_> {
    fn fill(&mut self, chunk: &mut Chunk, job: Job<'_>) -> Result<End> {
        chunk.records = true;
        let mut gather = Gather::new(chunk, self.sample, job.plain, job.room);
        let mut end = End::Open;
        while end == End::Open && gather.len() < job.chunk_bytes {
            self.progress.map_or(Ok(()), Progress::check)?;
            let (rows, handed, mut too_long) = (&mut self.rows, self.handed, false);
            let more = self.feed.next(job.most_uncut, &mut |document| {
                *rows += 1;
                too_long = document.len() > job.most_uncut;
                if too_long {
                    return false;
                }
                if *rows > handed && gather.takes(*rows) {
                    let added = gather.add(*rows, |out| {
                        out.extend_from_slice(document);
                        Ok(())
                    });
                    debug_assert!(added.is_ok(), "appending cannot fail");
                }
                !gather.full()
            })?;
            if too_long {
                let (most, more) = (job.most_uncut, more_memory(&job));
                let what = format!("longer than {most} bytes; expected shorter texts{more}");
                return Err(Error::format(format!("{}: row {}", self.path.display(), self.rows), what));
            }
            end = match (gather.full(), more) {
                (true, _) => End::Limit,
                (_, false) => End::File,
                _ => End::Open,
            };
        }
        self.handed = self.handed.max(self.rows);
        Ok(end)
    }

    fn position(&self) -> u64 {
        self.handed
    }

    fn skip(&mut self, to: u64, _splitter: &Splitter) -> Result<()> {
        self.handed = to;
        Ok(())
    }

    #[expect(clippy::cast_sign_loss, clippy::cast_precision_loss, reason = "for a progress bar")]
    fn used(&self) -> u64 {
        (self.size as f64 * self.feed.share_done()) as u64
    }
}
