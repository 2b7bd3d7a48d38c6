//! Pre-tokens → how often each occurs.
//!
//! In: chunks of text. Out: [`WordCounts`], the same for any split of the work. Called by `counts`.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;

use crate::error::{Error, Result};
use crate::input::{Chunk, ChunkReader, Inputs};
use crate::pretokenize::{Piece, Run, Splitter, TextPolicy};
use crate::progress::{Progress, Stage};
pub use crate::word_counts::WordCounts;

/// Counts the pre-tokens of inputs on `threads` threads.
pub fn count_files(
    inputs: &Inputs,
    splitter: &Splitter,
    policy: TextPolicy,
    threads: usize,
    chunk_bytes: usize,
    progress: &Progress,
) -> Result<WordCounts> {
    progress.begin(Stage::Count, inputs.total_bytes());
    let reader = ChunkReader::new(inputs, splitter, chunk_bytes).stopped_by(progress);
    let pause = |_: &_| progress.check().map(|()| false);
    let stops = (progress, progress);
    let (tables, _) = count_tables(&reader, (inputs, policy), threads, stops, |_, _| Ok(()), pause)?;
    join(tables, progress).map(Option::unwrap_or_default)
}

/// The same of what `reader` hands out, each thread with a table of its own; `make_room` sees it before it takes in so
/// many bytes of text. Once `pause`, which sees it too, says so, no more is taken: then all that was handed out is counted.
/// A chunk that was being read when the job was stopped is not, where `pause` says so then. `keep` is what stops tables from
/// taking in a chunk that was handed out. The number is that of documents that ended: records, or files.
pub(crate) fn count_tables(
    reader: &ChunkReader<'_>,
    (inputs, policy): (&Inputs, TextPolicy),
    threads: usize,
    (progress, keep): (&Progress, &Progress),
    make_room: impl Fn(&mut WordCounts, usize) -> Result<()> + Sync,
    pause: impl Fn(&WordCounts) -> Result<bool> + Sync,
) -> Result<(Vec<WordCounts>, u64)> {
    let (make_room, pause) = (&make_room, &pause);
    let documents = AtomicU64::new(0);
    let work = || -> Result<WordCounts> {
        let mut counts = WordCounts::stopped_by(keep);
        let mut chunk = Chunk::default();
        while !pause(&counts)? {
            match reader.next(&mut chunk) {
                Ok(true) => {}
                Ok(false) => break,
                Err(Error::Interrupted) if pause(&counts)? => break,
                Err(error) => return Err(error),
            }
            make_room(&mut counts, chunk.bytes.len())?;
            let before = counts.seen();
            for (start, text) in chunk.texts() {
                let counted = count_text(text, reader.splitter(&chunk), policy, &mut counts);
                counted.map_err(|e| inputs.locate(&chunk, start, e))?;
            }
            counts.whole()?;
            progress.add(chunk.read_bytes);
            progress.add_pretokens(counts.seen() - before);
            let ended = if chunk.records { chunk.record_count() } else { chunk.ends_file.into() };
            documents.fetch_add(ended, Relaxed);
        }
        Ok(counts.released())
    };
    let tables: Result<Vec<WordCounts>> = thread::scope(|scope| {
        let others: Vec<_> = (1..threads.max(1)).map(|_| scope.spawn(work)).collect();
        let mut all = vec![work()];
        // A panic in a thread is a defect of ours; let it go on as one.
        let join = |other: thread::ScopedJoinHandle<'_, _>| {
            other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        all.extend(others.into_iter().map(join));
        all.into_iter().collect()
    });
    Ok((tables?, documents.into_inner()))
}

/// The sum of tables, if there are any.
pub(crate) fn join(tables: Vec<WordCounts>, progress: &Progress) -> Result<Option<WordCounts>> {
    let mut tables = tables.into_iter();
    let Some(mut sum) = tables.next() else { return Ok(None) };
    tables.try_for_each(|table| sum.merge(table, progress))?;
    Ok(Some(sum))
}

/// Counts the pre-tokens of one text.
pub fn count_text(bytes: &[u8], splitter: &Splitter, policy: TextPolicy, counts: &mut WordCounts) -> Result<()> {
    let Ok(text) = simdutf8::basic::from_utf8(bytes) else {
        return splitter.split_bytes(bytes, policy, |piece| {
            if let Piece::Word(word) = piece {
                counts.add(word);
            }
        });
    };
    splitter.split_runs(text, |run| {
        if let Run::Words(ends) = run {
            counts.add_run(bytes, &ends);
        }
    })
}
