//! The second file of a checkpoint: merges, and what run it is of.
//!
//! In: settings and merges. Out: bytes; of bytes, merges again, or why not. Called by `checkpoint`.
//!
//! Layout of `FILE.merges`: magic, version, length of the head, head (JSON), pairs with their counts, XXH3 of all that;
//! little-endian.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_64;

use super::{Done, Setting};
use crate::error::{Error, Result};

const MAGIC: &[u8; 16] = b"bytekiln bpe-ck\n";
const VERSION: u64 = 1;

#[derive(Debug, Serialize, Deserialize)]
struct Head {
    settings: Vec<Setting>,
    ties: u64,
}

/// The bytes of the file.
pub(super) fn bytes_of(path: &Path, settings: &[Setting], done: &Done) -> Result<Vec<u8>> {
    let head = serde_json::to_vec(&Head { settings: settings.to_vec(), ties: done.ties });
    let head = head.map_err(|e| Error::format(path.display().to_string(), e.to_string()))?;
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend((head.len() as u64).to_le_bytes());
    bytes.extend(head);
    for (&(a, b), count) in done.pairs.iter().zip(&done.counts) {
        bytes.extend(a.to_le_bytes());
        bytes.extend(b.to_le_bytes());
        bytes.extend(count.to_le_bytes());
    }
    let checksum = XxHash3_64::oneshot(&bytes);
    bytes.extend(checksum.to_le_bytes());
    Ok(bytes)
}

/// What the file of a run with these settings holds.
///
/// # Errors
/// As [`Checkpoint::open`](super::Checkpoint::open) says of this file.
pub(super) fn read(path: &Path, settings: &[Setting]) -> Result<Done> {
    let place = path.display();
    let mut bytes = fs::read(path).map_err(|e| Error::io(path, &e))?;
    if !bytes.starts_with(MAGIC) {
        let what = "is no checkpoint of a training run; expected one, or a name that is free";
        return Err(Error::format(place.to_string(), what));
    }
    let split = bytes.len().saturating_sub(8);
    let checksum = bytes.split_off(split);
    if XxHash3_64::oneshot(&bytes).to_le_bytes() != checksum[..] {
        return Err(broken(path));
    }
    let at = |from: usize| bytes.get(from..from + 8).and_then(|n| n.try_into().ok()).map(u64::from_le_bytes);
    let version = at(16).ok_or_else(|| broken(path))?;
    if version != VERSION {
        let what = format!("version {version} of the format; expected {VERSION}, of this version of bytekiln");
        return Err(Error::format(place.to_string(), what));
    }
    let head = at(24).and_then(|len| 32usize.checked_add(usize::try_from(len).ok()?));
    let split = head.filter(|&end| end <= bytes.len()).ok_or_else(|| broken(path))?;
    let body = bytes.split_off(split);
    let head: Head = serde_json::from_slice(&bytes[32..]).map_err(|_| broken(path))?;
    compare(path, &head.settings, settings)?;
    let (items, []) = body.as_chunks::<16>() else { return Err(broken(path)) };
    let mut done = Done { ties: head.ties, ..Done::default() };
    for &[a, b, c, d, e, f, g, h, ref count @ ..] in items {
        done.pairs.push((u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])));
        done.counts.push(count.iter().rev().fold(0, |n, &byte| n << 8 | u64::from(byte)));
    }
    Ok(done)
}

/// Refuses a file of another run.
fn compare(path: &Path, found: &[Setting], expected: &[Setting]) -> Result<()> {
    let none = || ("inputs".to_string(), "fewer".to_string());
    for n in 0..found.len().max(expected.len()) {
        let theirs = found.get(n).cloned().unwrap_or_else(none);
        let ours = expected.get(n).cloned().unwrap_or_else(none);
        if theirs != ours {
            return Err(Error::Config(format!(
                "{}: is of a run with {} {}; found {} {}; expected the same, another checkpoint, or none there (delete it to begin anew)",
                path.display(),
                theirs.0,
                theirs.1,
                ours.0,
                ours.1
            )));
        }
    }
    Ok(())
}

fn broken(path: &Path) -> Error {
    Error::format(path.display().to_string(), "a broken checkpoint; expected a whole one (delete it to begin anew)")
}
