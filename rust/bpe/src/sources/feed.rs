//! Documents that another library reads: parquet through pyarrow, which the binding brings.
//!
//! In: a [`Feed`]. Out: filled chunks. Called by `input`.

use std::path::Path;

use crate::error::Result;
use crate::input::Chunk;
use crate::pretokenize::Splitter;
use crate::sources::document::Gather;
use crate::sources::sample::Sample;
use crate::sources::{End, Job, Source};

/// A column of text that is being read, batch by batch.
pub trait Feed: Send {
    /// Gives the documents of the next batch, in order, to `take`, until that says `false`; `false` at the end.
    fn next(&mut self, take: &mut dyn FnMut(&[u8]) -> bool) -> Result<bool>;

    /// How much of the file has been read, 0 to 1.
    fn share_done(&self) -> f64;
}

/// Opens a column of a file by its name.
pub type OpenFeed = dyn Fn(&Path, &str) -> Result<Box<dyn Feed>> + Send + Sync;

/// A feed as a source.
pub(crate) struct FeedSource {
    feed: Box<dyn Feed>,
    sample: Option<Sample>,
    size: u64,
    rows: u64,
    /// Rows that were handed out before.
    skip: u64,
}

impl FeedSource {
    pub fn new(feed: Box<dyn Feed>, sample: Option<Sample>, size: u64) -> Self {
        Self { feed, sample, size, rows: 0, skip: 0 }
    }
}

impl Source for FeedSource {
    fn fill(&mut self, chunk: &mut Chunk, job: Job<'_>) -> Result<End> {
        chunk.records = true;
        let mut gather = Gather::new(chunk, self.sample, job.plain, job.room);
        while gather.len() < job.chunk_bytes {
            let (rows, skip) = (&mut self.rows, self.skip);
            let more = self.feed.next(&mut |document| {
                *rows += 1;
                if *rows > skip && gather.takes(*rows) {
                    let added = gather.add(*rows, |out| {
                        out.extend_from_slice(document);
                        Ok(())
                    });
                    debug_assert!(added.is_ok(), "appending cannot fail");
                }
                !gather.full()
            })?;
            if gather.full() {
                return Ok(End::Limit);
            }
            if !more {
                return Ok(End::File);
            }
        }
        Ok(End::Open)
    }

    fn position(&self) -> u64 {
        self.rows
    }

    fn skip(&mut self, to: u64, _splitter: &Splitter) -> Result<()> {
        self.skip = to;
        Ok(())
    }

    #[expect(clippy::cast_sign_loss, clippy::cast_precision_loss, reason = "for a progress bar")]
    fn used(&self) -> u64 {
        (self.size as f64 * self.feed.share_done()) as u64
    }
}
