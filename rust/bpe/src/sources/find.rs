//! What was named → files: folders are walked, globs expanded, kinds read off the names.
//!
//! In: paths as the user gave them. Out: files in the order of the text; of each, its kind and packing by name.
//! Nothing is opened here. Called by `input`.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::sources::unpack::Packing;

/// What a file's name says of its contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// UTF-8 text, its documents delimited by special tokens.
    Text,
    /// One JSON object a line.
    Jsonl,
    /// A table with a column of text.
    Parquet,
}

/// A file to read.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    /// The file; `standard input` for that.
    pub path: PathBuf,
    pub stdin: bool,
    /// Found in a directory; nobody named it.
    pub in_directory: bool,
    pub kind: Kind,
    /// How its name says that it is packed.
    pub packing: Option<Packing>,
}

/// Endings of text; a packed file may also have none before its packing's.
const TEXT: [&str; 3] = ["txt", "text", "md"];
/// Endings of containers that hold many files or that nothing here unpacks.
const FOREIGN: [&str; 9] = ["zip", "7z", "tar", "tgz", "rar", "z", "lz4", "lzma", "br"];

/// The files of what was named, in order.
pub(crate) fn files(named: &[PathBuf], stdin_is_jsonl: bool) -> Result<Vec<Found>> {
    let mut found = Vec::new();
    for path in named {
        if path.as_os_str() == "-" {
            if found.iter().any(|f: &Found| f.stdin) {
                return Err(Error::Config("inputs: found - twice; expected standard input at most once".into()));
            }
            let kind = if stdin_is_jsonl { Kind::Jsonl } else { Kind::Text };
            found.push(Found { path: "standard input".into(), stdin: true, in_directory: false, kind, packing: None });
        } else if path.is_dir() {
            walk(path, &mut found)?;
        } else if let Some(pattern) = glob_of(path) {
            expand(pattern, &mut found)?;
        } else {
            found.push(named_file(path)?);
        }
    }
    Ok(found)
}

/// The text of a path that is a glob: a file of just that name comes first.
fn glob_of(path: &Path) -> Option<&str> {
    let text = path.to_str().filter(|text| text.contains(['*', '?', '[']))?;
    path.symlink_metadata().is_err().then_some(text)
}

fn expand(pattern: &str, found: &mut Vec<Found>) -> Result<()> {
    let options = glob::MatchOptions {
        case_sensitive: true,
        require_literal_separator: true,
        // Hidden files are left out, as a shell does.
        require_literal_leading_dot: true,
    };
    let matches = glob::glob_with(pattern, options).map_err(|e| {
        Error::Config(format!("{pattern}: {e}; expected a file, a folder or a glob such as data/*.txt"))
    })?;
    let mut paths = Vec::new();
    for path in matches {
        paths.push(path.map_err(|e| Error::io(e.path(), e.error()))?);
    }
    if paths.is_empty() {
        let what = "no file matches; expected at least one".into();
        return Err(Error::File { path: pattern.into(), what });
    }
    paths.sort();
    let mut listed = Vec::new();
    for path in paths {
        if path.is_dir() { walk(&path, &mut listed)? } else { listed.push(named_file(&path)?) }
    }
    // `**/*` matches a folder and the files in it: each is read once, where it comes first.
    let mut seen = HashSet::new();
    found.extend(listed.into_iter().filter(|file| seen.insert(file.path.clone())));
    Ok(())
}

/// The files of a folder with known endings, in the order of their paths.
fn walk(folder: &Path, found: &mut Vec<Found>) -> Result<()> {
    let before = found.len();
    let hidden = |name: &std::ffi::OsStr| name.as_encoded_bytes().starts_with(b".");
    let entries = walkdir::WalkDir::new(folder).follow_links(true).sort_by_file_name().into_iter();
    for entry in entries.filter_entry(|e| e.depth() == 0 || !hidden(e.file_name())) {
        let entry = match entry {
            Ok(entry) => entry,
            Err(e) if e.depth() > 0 && e.path().is_some_and(|path| may_lead_nowhere(path, e.io_error())) => continue,
            Err(e) => return Err(failed(e.path().unwrap_or(folder), e.io_error())),
        };
        if !entry.file_type().is_file() {
            continue;
        }
        if let Some((kind, packing)) = wanted(entry.path()) {
            found.push(Found { path: entry.into_path(), stdin: false, in_directory: true, kind, packing });
        }
    }
    if found.len() == before {
        let what = "no file with a known ending in this directory; expected .txt, .text, .md, .jsonl, .ndjson or \
                    .parquet, the first five also packed (.gz .zst .xz .bz2)";
        return Err(Error::File { path: folder.into(), what: what.into() });
    }
    Ok(())
}

/// Whether and as what a file of a folder is read, by its ending.
fn wanted(path: &Path) -> Option<(Kind, Option<Packing>)> {
    let (kind, packing, foreign) = read_name(path);
    let packed_parquet = kind == Some(Kind::Parquet) && packing.is_some();
    kind.filter(|_| foreign.is_none() && !packed_parquet).map(|kind| (kind, packing))
}

/// Whether an entry that cannot be looked at is a link to nothing whose name says that it would not be read either. One
/// without an ending may have been a folder of text. What is there but cannot be reached is another matter.
fn may_lead_nowhere(path: &Path, error: Option<&io::Error>) -> bool {
    let is_hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
    let is_other = path.extension().is_some() && wanted(path).is_none();
    leads_nowhere(path, error) && (is_hidden || is_other)
}

fn leads_nowhere(path: &Path, error: Option<&io::Error>) -> bool {
    error.is_some_and(|error| error.kind() == io::ErrorKind::NotFound) && path.is_symlink()
}

/// Why what a folder holds cannot be read.
fn failed(path: &Path, error: Option<&io::Error>) -> Error {
    let what = match error {
        None => "is a link to a folder that it lies in; expected a folder without loops",
        error if leads_nowhere(path, error) => {
            "is a link to nothing in a directory of the inputs; expected a file there, or no link"
        }
        Some(error) => return Error::io(path, error),
    };
    Error::File { path: path.into(), what: what.into() }
}

/// A file that was named itself: whatever its ending, it is read, unless that is known to be something else.
fn named_file(path: &Path) -> Result<Found> {
    let (kind, packing, foreign) = read_name(path);
    if let Some(ending) = foreign {
        let what = format!("found a .{ending}; expected text, jsonl or parquet, plain or as .gz, .zst, .xz or .bz2");
        return Err(Error::File { path: path.into(), what });
    }
    let kind = kind.unwrap_or(Kind::Text);
    if kind == Kind::Parquet && packing.is_some() {
        let what = "is a packed parquet; expected it unpacked (parquet packs its own columns)".into();
        return Err(Error::File { path: path.into(), what });
    }
    Ok(Found { path: path.into(), stdin: false, in_directory: false, kind, packing })
}

/// Kind, packing and, where there is one, the ending of a foreign container, by the name alone.
fn read_name(path: &Path) -> (Option<Kind>, Option<Packing>, Option<String>) {
    let ending = |path: &Path| path.extension().map(|e| e.to_string_lossy().to_lowercase());
    let packing = ending(path).as_deref().and_then(Packing::of_ending);
    let inner = if packing.is_some() { path.with_extension("") } else { path.to_path_buf() };
    let inner = ending(&inner);
    let kind = match inner.as_deref() {
        Some("jsonl" | "ndjson") => Some(Kind::Jsonl),
        Some("parquet") => Some(Kind::Parquet),
        Some(text) if TEXT.contains(&text) => Some(Kind::Text),
        None if packing.is_some() => Some(Kind::Text),
        _ => None,
    };
    (kind, packing, inner.filter(|e| FOREIGN.contains(&e.as_str())))
}
