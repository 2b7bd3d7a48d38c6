//! Standard input, read by a thread of its own, so that a job that waits for input can still be stopped.
//!
//! In: bytes from whoever writes. Out: a reader. Called by `unpack`.

use std::io::{self, Read};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Duration;

use crate::progress::Progress;

const BLOCK: usize = 256 << 10;
/// Blocks that wait to be taken.
const AHEAD: usize = 4;
/// How often a job that waits looks whether it was stopped.
const LOOK: Duration = Duration::from_millis(20);

/// The reading end.
pub(crate) struct Pipe<'a> {
    blocks: Receiver<io::Result<Vec<u8>>>,
    block: Vec<u8>,
    at: usize,
    progress: Option<&'a Progress>,
}

impl<'a> Pipe<'a> {
    /// Begins to read. The thread ends with the input, or with the process: a blocked read cannot be called off.
    pub fn open(progress: Option<&'a Progress>) -> Self {
        let (send, blocks) = sync_channel(AHEAD);
        thread::spawn(move || {
            loop {
                let mut block = Vec::with_capacity(BLOCK);
                let read = io::stdin().lock().take(BLOCK as u64).read_to_end(&mut block);
                let last = !matches!(read, Ok(n) if n > 0);
                if send.send(read.map(|_| block)).is_err() || last {
                    return;
                }
            }
        });
        Self { blocks, block: Vec::new(), at: 0, progress }
    }
}

impl Read for Pipe<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while self.at == self.block.len() {
            match self.blocks.recv_timeout(LOOK) {
                Ok(Ok(block)) if block.is_empty() => return Ok(0),
                Ok(block) => (self.block, self.at) = (block?, 0),
                Err(RecvTimeoutError::Disconnected) => return Ok(0),
                Err(RecvTimeoutError::Timeout) if self.progress.is_some_and(|p| p.check().is_err()) => {
                    return Err(io::Error::other("stopped"));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
        let count = out.len().min(self.block.len() - self.at);
        out[..count].copy_from_slice(&self.block[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}
