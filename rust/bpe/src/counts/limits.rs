//! How much memory counting and merging may take, and where goes what does not fit.
//!
//! In: `--max-memory`, or nothing. Out: [`Memory`], and each thread's share of it. Called by `tally`.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::sources::MOST_UNCUT_BYTES;

/// A cap on memory, and the folder of the sorted runs that do not fit.
#[derive(Debug, Clone)]
pub struct Memory {
    /// Bytes, above what the process holds when it begins.
    pub cap: u64,
    /// Where runs are written. They have no names there: the system frees them with the process, however it ends.
    pub folder: PathBuf,
}

/// What one thread may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Share {
    /// Bytes of its table, while it grows.
    pub(super) table: usize,
    /// Bytes of text at a time: few enough that a table is nearly full before it could overflow.
    pub(super) chunk: usize,
    /// Runs that are merged at a time.
    pub(super) fan_in: usize,
}

impl Memory {
    /// The smallest cap: below, blocks and buffers would be most of it.
    pub const LEAST: u64 = 16 << 20;
    /// Bytes that a thread holds beside its table: blocks, the compressor, the stack.
    const BESIDE: u64 = 2 << 20;
    /// Bytes of a run that is read.
    const READER: u64 = 256 << 10;

    /// `cap` bytes, by default [`Self::default_cap`].
    ///
    /// Runs go to `$TMPDIR` where that is set, else beside `output`, else to the system's temporary folder.
    pub fn new(cap: Option<u64>, output: Option<&Path>) -> Result<Self> {
        let cap = cap.unwrap_or_else(Self::default_cap);
        if cap < Self::LEAST {
            let (found, least) = (human(cap), human(Self::LEAST));
            return Err(Error::Config(format!("max_memory: found {found}; expected {least} or more")));
        }
        let beside = || match output.and_then(Path::parent) {
            Some(folder) if !folder.as_os_str().is_empty() => folder.into(),
            Some(_) => PathBuf::from("."),
            None => std::env::temp_dir(),
        };
        let folder = std::env::var_os("TMPDIR").filter(|dir| !dir.is_empty()).map_or_else(beside, PathBuf::from);
        Ok(Self { cap, folder })
    }

    /// Half of the machine's memory (of the container's limit, where that is less).
    pub fn default_cap() -> u64 {
        (physical() / 2).max(Self::LEAST)
    }

    /// The longest text without a border, or line of records, that has room beside the tables: it lies there twice
    /// while it grows, and its word once more.
    pub(crate) fn longest_uncut(&self) -> usize {
        usize::try_from(self.cap.max(Self::LEAST) / 8).map_or(MOST_UNCUT_BYTES, |most| most.min(MOST_UNCUT_BYTES))
    }

    /// Threads that the cap has room for, at most `wanted`.
    pub(super) fn threads(&self, wanted: usize) -> usize {
        wanted.clamp(1, usize::try_from(self.cap / (4 * Self::BESIDE)).unwrap_or(wanted).max(1))
    }

    /// The share of one of `threads`, which would like chunks of `chunk` bytes.
    pub(super) fn share(&self, threads: usize, chunk: usize) -> Share {
        let each = self.cap / threads.max(1) as u64;
        let table = usize::try_from(each.saturating_sub(Self::BESIDE)).unwrap_or(usize::MAX);
        let fan_in = usize::try_from(each / Self::READER).unwrap_or(usize::MAX).clamp(4, 64);
        Share { table, chunk: chunk.min((table / 256).max(4 << 10)), fan_in }
    }
}

/// Bytes of memory of the machine, or of the container that this process is in; 8 GiB where nobody tells.
fn physical() -> u64 {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
        Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
    });
    let group = |path: &str| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let groups = [group("/sys/fs/cgroup/memory.max"), group("/sys/fs/cgroup/memory/memory.limit_in_bytes")];
    groups.into_iter().flatten().chain([machine.unwrap_or(8 << 30)]).min().unwrap_or(8 << 30)
}

/// Gives back to the system what tables have left behind. glibc keeps freed blocks of up to 32 MiB once one of that size
/// was freed, in each thread's own heap: half of a small cap, measured.
pub(super) fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu", not(miri)))]
    {
        unsafe extern "C" {
            fn malloc_trim(pad: usize) -> std::ffi::c_int;
        }
        // SAFETY: glibc's own function, of this signature and safe from any thread; it touches free memory only.
        let _ = unsafe { malloc_trim(0) };
    }
}

/// Bytes as a person says them.
pub(super) fn human(bytes: u64) -> String {
    let units = [(1_000_000_000_000, "TB"), (1_000_000_000, "GB"), (1_000_000, "MB"), (1000, "kB")];
    let unit = units.into_iter().find(|&(size, _)| bytes >= size);
    // Upwards: what is said is enough.
    let tenths = |size| bytes.div_ceil(size / 10);
    unit.map_or_else(
        || format!("{bytes} B"),
        |(size, name)| format!("{}.{} {name}", tenths(size) / 10, tenths(size) % 10),
    )
}
