//! One JSON object a line → documents.
//!
//! In: a [`Stream`] of lines. Out: the texts of one field. Lines are taken under the reader's lock, and made
//! into texts outside of it, so that the threads share that work too. Called by `input`.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};

use crate::error::{Error, Result};
use crate::input::Chunk;
use crate::pretokenize::Splitter;
use crate::sources::document::Gather;
use crate::sources::sample::Sample;
use crate::sources::unpack::Stream;
use crate::sources::{End, Job, Source, more_memory};

/// Bytes at a time in which lines are passed over.
const BLOCK: usize = 64 << 10;

/// What to take from a line.
#[derive(Clone, Copy)]
pub(crate) struct Records<'a> {
    pub field: &'a str,
    pub sample: Option<Sample>,
    /// What the file is called in messages.
    pub path: &'a std::path::Path,
}

/// A file of records that is being read.
pub(crate) struct Jsonl<'a> {
    stream: Stream<'a>,
    records: Records<'a>,
    /// Of a line that was not whole.
    rest: Vec<u8>,
    /// Lines that were handed out.
    lines: u64,
}

impl<'a> Jsonl<'a> {
    pub fn new(stream: Stream<'a>, records: Records<'a>) -> Self {
        Self { stream, records, rest: Vec::new(), lines: 0 }
    }
}

impl Source for Jsonl<'_> {
    fn fill(&mut self, chunk: &mut Chunk, job: Job<'_>) -> Result<End> {
        chunk.bytes.clear();
        chunk.places.clear();
        let raw = &mut chunk.raw;
        raw.clear();
        raw.append(&mut self.rest);
        let (mut wanted, mut searched) = (job.chunk_bytes, 0);
        let (cut, ended) = loop {
            if self.stream.read_to(raw, wanted)? {
                break (raw.len(), true);
            }
            if let Some(at) = memchr::memrchr(b'\n', &raw[searched..]) {
                break (searched + at + 1, false);
            }
            searched = raw.len();
            if searched >= job.most_uncut {
                let (line, path) = (self.lines + 1, self.records.path.display());
                let (most, more) = (job.most_uncut, more_memory(&job));
                let what = format!("longer than {most} bytes; expected shorter records{more}");
                return Err(Error::format(format!("{path}: line {line}"), what));
            }
            wanted = (raw.len().max(job.chunk_bytes) * 2).min(job.most_uncut);
        };
        self.rest.extend_from_slice(&raw[cut..]);
        raw.truncate(cut);
        chunk.records = true;
        chunk.first_line = self.lines + 1;
        self.lines += memchr::memchr_iter(b'\n', raw).count() as u64;
        // Where the limit cuts depends on all texts before: then they are made here, in order.
        let full = job.room < u64::MAX && unpack(chunk, self.records, job.plain, job.room)?;
        Ok(match (full, ended) {
            (true, _) => End::Limit,
            (_, true) => End::File,
            _ => End::Open,
        })
    }

    fn used(&self) -> u64 {
        self.stream.used()
    }

    fn position(&self) -> u64 {
        self.lines
    }

    fn skip(&mut self, to: u64, _splitter: &Splitter) -> Result<()> {
        while self.lines < to {
            let mut raw = std::mem::take(&mut self.rest);
            let wanted = raw.len() + BLOCK;
            let ended = self.stream.read_to(&mut raw, wanted)?;
            let mut from = 0;
            while self.lines < to
                && let Some(at) = memchr::memchr(b'\n', &raw[from..])
            {
                from += at + 1;
                self.lines += 1;
            }
            if self.lines == to {
                self.rest.extend_from_slice(&raw[from..]);
            } else if ended {
                let what = format!("ends in line {}; expected {to} that were read before", self.lines + 1);
                return Err(Error::File { path: self.records.path.into(), what });
            }
        }
        Ok(())
    }
}

/// Makes the lines that a chunk holds into its texts; `true` where the limit is reached.
pub(crate) fn unpack(chunk: &mut Chunk, records: Records<'_>, plain: &Splitter, room: u64) -> Result<bool> {
    let raw = std::mem::take(&mut chunk.raw);
    let first = chunk.first_line;
    let mut gather = Gather::new(chunk, records.sample, plain, room);
    let mut result = Ok(());
    for (number, line) in (first..).zip(raw.split(|&b| b == b'\n')) {
        // Some writers begin a file with a byte order mark.
        let line = if number == 1 { line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line) } else { line };
        if gather.full() || line.trim_ascii().is_empty() || !gather.takes(number) {
            continue;
        }
        result = gather.add(number, |out| {
            text_of(line, records.field, out)
                .map_err(|what| Error::format(format!("{}: line {number}", records.path.display()), what))
        });
        if result.is_err() {
            break;
        }
    }
    let full = gather.full();
    chunk.raw = raw;
    chunk.raw.clear();
    result.map(|()| full)
}

/// Appends the text of a field of a line; an error says what was found.
fn text_of(line: &[u8], field: &str, out: &mut Vec<u8>) -> Result<(), String> {
    let start = out.len();
    let mut json = serde_json::Deserializer::from_slice(line);
    let object = Object { field, out, start };
    let parsed = object.deserialize(&mut json).and_then(|found| json.end().map(|()| found));
    match parsed {
        Ok(true) => Ok(()),
        Ok(false) => {
            Err(format!("no field {field:?}; expected a JSON object with a text there (--field names another)"))
        }
        Err(error) => {
            let what = error.to_string();
            let what = what.rsplit_once(" at line ").map_or(&*what, |(what, _)| what);
            Err(match error.classify() {
                serde_json::error::Category::Data => what.to_string(),
                _ => format!("column {}: invalid JSON ({what}); expected one JSON object a line", error.column()),
            })
        }
    }
}

/// A JSON object of which one field is wanted: whether it is there, and its text in `out`.
struct Object<'o> {
    field: &'o str,
    out: &'o mut Vec<u8>,
    start: usize,
}

impl<'de> DeserializeSeed<'de> for Object<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<bool, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Object<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<bool, M::Error> {
        let mut found = false;
        while let Some(wanted) = map.next_key_seed(Key(self.field))? {
            if wanted {
                // A field that is there twice counts as Python's and JavaScript's readers take it: the last one.
                self.out.truncate(self.start);
                map.next_value_seed(Text { field: self.field, out: &mut *self.out })?;
                found = true;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(found)
    }
}

/// Whether a key is the wanted one.
struct Key<'k>(&'k str);

impl<'de> DeserializeSeed<'de> for Key<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<bool, D::Error> {
        json.deserialize_bytes(self)
    }
}

impl Visitor<'_> for Key<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E>(self, key: &str) -> Result<bool, E> {
        Ok(key == self.0)
    }

    fn visit_bytes<E>(self, key: &[u8]) -> Result<bool, E> {
        Ok(key == self.0.as_bytes())
    }
}

/// A text as bytes: whether they are UTF-8 is for the reader's policy to judge, half surrogates included.
struct Text<'t> {
    field: &'t str,
    out: &'t mut Vec<u8>,
}

impl<'de> DeserializeSeed<'de> for Text<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        json.deserialize_bytes(self)
    }
}

impl Visitor<'_> for Text<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a text in field {:?}", self.field)
    }

    fn visit_bytes<E>(self, text: &[u8]) -> Result<(), E> {
        self.out.extend_from_slice(text);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Result<Vec<u8>, String> {
        let mut out = b"before".to_vec();
        text_of(line.as_bytes(), "text", &mut out).map(|()| out[6..].to_vec())
    }

    #[test]
    fn escapes_and_surrogates_are_right() {
        for (line, text) in [
            (r#"{"text": "a\n\t\"\\\/\u0041"}"#, "a\n\t\"\\/A"),
            (r#"{"text": "\ud83d\ude00 é \u00e9"}"#, "😀 é é"),
            (r#"  {"a": [{"text": "no"}], "text":"yes", "b": {"text": null}}  "#, "yes"),
            (r#"{"te\u0078t": "by an escaped key"}"#, "by an escaped key"),
            (r#"{"text": "first", "text": "last"}"#, "last"),
            (r#"{"text": ""}"#, ""),
        ] {
            assert_eq!(read(line), Ok(text.as_bytes().to_vec()), "{line}");
        }
        // Half a pair is no text: its bytes stay, and the policy for invalid UTF-8 decides.
        assert_eq!(read(r#"{"text": "a\ud83d"}"#), Ok(b"a\xed\xa0\xbd".to_vec()));
        assert_eq!(read(r#"{"text": "a\ud83db"}"#), Ok(b"a\xed\xa0\xbdb".to_vec()));
    }

    #[test]
    fn what_is_no_record_is_said() {
        for (line, words) in [
            ("{\"text\": \"open", vec!["invalid JSON", "column"]),
            ("plain text", vec!["invalid JSON", "column"]),
            ("{\"text\": \"a\"} {\"text\": \"b\"}", vec!["invalid JSON", "trailing"]),
            ("[\"text\"]", vec!["expected an object"]),
            ("\"text\"", vec!["expected an object"]),
            ("{\"txt\": \"a\"}", vec!["no field \"text\"", "--field"]),
            ("{}", vec!["no field \"text\""]),
            ("{\"text\": 7}", vec!["integer", "a text in field \"text\""]),
            ("{\"text\": null}", vec!["null", "a text in field \"text\""]),
            ("{\"text\": [1, 2]}", vec!["sequence", "a text in field \"text\""]),
            ("{\"text\": {\"a\": 1}}", vec!["map", "a text in field \"text\""]),
        ] {
            let error = read(line).unwrap_err();
            assert!(words.iter().all(|word| error.contains(word)), "{line}: {error}");
        }
    }
}
