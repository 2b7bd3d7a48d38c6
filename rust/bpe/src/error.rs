//! One error type for the whole crate. Every message reads `where: what was found; expected what`.

use std::io;
use std::path::{Path, PathBuf};

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong on input that the caller gave.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or folder cannot be used: missing, unreadable, a directory, empty, full disk.
    #[error("{}: {what}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What was found and what was expected.
        what: String,
    },
    /// An output exists and overwriting was not asked for.
    #[error(
        "{}: exists already; expected a new name, or ask to overwrite it (--overwrite)",
        .0.display()
    )]
    Exists(PathBuf),
    /// Text that is not UTF-8, or holds a special token where none is allowed.
    #[error("{0}")]
    Text(String),
    /// A malformed or truncated tokenizer file.
    #[error("{place}: {what}")]
    Format {
        /// File, and the place in it where known.
        place: String,
        /// What was found and what was expected.
        what: String,
    },
    /// A parameter that cannot work.
    #[error("{0}")]
    Config(String),
    /// The system gives no more memory.
    #[error("{0}")]
    Memory(String),
    /// An error of the caller's own code, which was called for input.
    #[error("{0}")]
    Called(Box<dyn std::error::Error + Send + Sync>),
    /// The caller asked to stop.
    #[error("interrupted")]
    Interrupted,
}

impl Error {
    /// A file error from the operating system's word, in this crate's form.
    pub fn io(path: &Path, error: &io::Error) -> Self {
        let what = match error.kind() {
            io::ErrorKind::NotFound => "no such file; expected an existing one".into(),
            io::ErrorKind::PermissionDenied => "permission denied; expected read and write rights there".into(),
            io::ErrorKind::IsADirectory => "is a directory; expected a file".into(),
            io::ErrorKind::StorageFull => "no space left on the device; expected room for the output".into(),
            io::ErrorKind::FileTooLarge => {
                "the file grew past the limit of its size; expected room for the output".into()
            }
            io::ErrorKind::ReadOnlyFilesystem => "read-only file system; expected a writable folder".into(),
            _ => format!("{error}; expected a readable and writable file"),
        };
        Self::File { path: path.to_path_buf(), what }
    }

    /// A format error at a place.
    pub fn format(place: impl Into<String>, what: impl Into<String>) -> Self {
        Self::Format { place: place.into(), what: what.into() }
    }
}
