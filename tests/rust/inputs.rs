//! Every kind of input against the plain reading of its documents, over packings, chunks and threads.

#![allow(clippy::unwrap_used, missing_docs, reason = "a test ends where something fails")]
#![allow(clippy::format_collect, clippy::cast_precision_loss, reason = "small texts, shares of 64 bits")]

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytekiln_bpe::corpus::{EncodeOptions, encode_files};
use bytekiln_bpe::count::{WordCounts, count_files};
use bytekiln_bpe::encode::{Allowed, Encoder};
use bytekiln_bpe::input::{Chunk, ChunkReader, Inputs, Position};
use bytekiln_bpe::pretokenize::{Pattern, Piece, Splitter, TextPolicy};
use bytekiln_bpe::progress::Progress;
use bytekiln_bpe::sources::{Feed, InputSpec};
use bytekiln_bpe::train::{Options, TieBreak, train};
use bytekiln_bpe::vocab::Vocab;
use bytekiln_bpe::{Error, Result};
use proptest::prelude::*;

const EOT: &str = "<|endoftext|>";
const SPECIALS: [&str; 2] = [EOT, "<|endoftext|><|pad|>"];
const PACKINGS: [&str; 4] = ["gz", "zst", "xz", "bz2"];

fn splitter(pattern: &str) -> Splitter {
    Splitter::new(Arc::new(Pattern::new(pattern).unwrap()), &SPECIALS.map(String::from)).unwrap()
}

fn pack(packing: &str, bytes: &[u8]) -> Vec<u8> {
    match packing {
        "gz" => {
            let mut out = flate2::GzBuilder::new().filename("a name").write(vec![], flate2::Compression::fast());
            out.write_all(bytes).unwrap();
            out.finish().unwrap()
        }
        "zst" => {
            let mut out = zstd::stream::Encoder::new(vec![], 1).unwrap();
            out.include_checksum(true).unwrap();
            out.write_all(bytes).unwrap();
            out.finish().unwrap()
        }
        "xz" => {
            let mut out = vec![];
            liblzma::read::XzEncoder::new(bytes, 1).read_to_end(&mut out).unwrap();
            out
        }
        "bz2" => {
            let mut out = vec![];
            bzip2::read::BzEncoder::new(bytes, bzip2::Compression::fast()).read_to_end(&mut out).unwrap();
            out
        }
        _ => bytes.to_vec(),
    }
}

/// One file of an input.
#[derive(Debug, Clone)]
enum Doc {
    Text(String),
    /// Lines; `None` is a blank one.
    Jsonl(Vec<Option<String>>),
    /// Rows of another library's file.
    Rows(Vec<String>),
}

#[derive(Debug, Clone)]
struct File {
    doc: Doc,
    packing: &'static str,
    /// Where the packed file's second member begins, in percent of its bytes.
    member: usize,
}

impl File {
    fn bytes(&self) -> Vec<u8> {
        match &self.doc {
            Doc::Text(text) => text.clone().into_bytes(),
            Doc::Jsonl(lines) => {
                let line = |line: &Option<String>| match line {
                    Some(text) => serde_json::json!({"id": 1, "text": text, "more": ["text"]}).to_string(),
                    None => " \r".into(),
                };
                lines.iter().map(line).collect::<Vec<_>>().join("\n").into_bytes()
            }
            Doc::Rows(rows) => serde_json::to_vec(rows).unwrap(),
        }
    }

    fn write(&self, folder: &Path, place: usize) -> PathBuf {
        let kind = match self.doc {
            Doc::Text(_) => "txt",
            Doc::Jsonl(_) => "jsonl",
            Doc::Rows(_) => "parquet",
        };
        let bytes = self.bytes();
        let (name, packed) = match (&self.doc, self.packing) {
            (Doc::Rows(_), _) | (_, "") => (format!("{place}.{kind}"), bytes),
            (_, packing) => {
                let (first, second) = bytes.split_at(bytes.len() * self.member / 100);
                (format!("{place}.{kind}.{packing}"), [pack(packing, first), pack(packing, second)].concat())
            }
        };
        let path = folder.join(name);
        fs::write(&path, packed).unwrap();
        path
    }

    /// (number, text, whether special tokens are such)
    fn documents(&self, sampled: bool) -> Vec<(u64, String, bool)> {
        match &self.doc {
            Doc::Text(text) if sampled => {
                // Ends of text by the definition: the longest special token at each place, from the left.
                let (mut documents, mut start, mut at) = (vec![], 0, 0);
                while at < text.len() {
                    let found =
                        SPECIALS.iter().rev().find(|special| text.as_bytes()[at..].starts_with(special.as_bytes()));
                    at += found.map_or(1, |special| special.len());
                    if found == Some(&EOT) {
                        documents.push(text[start..at].to_string());
                        start = at;
                    }
                }
                documents.push(text[start..].to_string());
                (0..).zip(documents).map(|(i, document)| (i, document, true)).collect()
            }
            Doc::Text(text) => vec![(0, text.clone(), true)],
            Doc::Jsonl(lines) => (1..).zip(lines).filter_map(|(i, l)| Some((i, l.clone()?, false))).collect(),
            Doc::Rows(rows) => (1..).zip(rows).map(|(i, row)| (i, row.clone(), false)).collect(),
        }
    }
}

fn takes(spec: &InputSpec, file: usize, number: u64) -> bool {
    let key = [spec.seed, file as u64, number].map(u64::to_le_bytes).concat();
    spec.sample.is_none_or(|share| twox_hash::XxHash3_64::oneshot(&key) as f64 <= share * 2f64.powi(64))
}

/// Counts document after document, whole, with the limit as its definition says.
fn naive(files: &[File], spec: &InputSpec, splitter: &Splitter) -> (BTreeMap<Vec<u8>, u64>, u64) {
    let plain = splitter.without_specials();
    let mut counts = BTreeMap::new();
    let mut room = spec.limit_bytes.unwrap_or(u64::MAX) as usize;
    let all = room;
    'files: for (place, file) in files.iter().enumerate() {
        let kept = file.documents(spec.sample.is_some()).into_iter().filter(|d| takes(spec, place, d.0));
        // The documents of a text file follow each other in it: the limit cuts their text.
        let texts: Vec<(String, bool)> = match file.doc {
            Doc::Text(_) => vec![(kept.map(|d| d.1).collect(), true)],
            _ => kept.map(|d| (d.1, d.2)).collect(),
        };
        for (mut text, special) in texts {
            let splitter = if special { splitter } else { &plain };
            let crosses = text.len() > room;
            if crosses {
                let whole = (0..=room).rev().find(|&at| text.is_char_boundary(at)).unwrap();
                let cut = splitter.safe_cut(&text.as_bytes()[..room]).unwrap_or(whole);
                text.truncate(cut);
            }
            room -= text.len();
            let add = |piece: Piece<'_>| {
                if let Piece::Word(word) = piece {
                    *counts.entry(word.to_vec()).or_insert(0u64) += 1;
                }
            };
            splitter.split(&text, add).unwrap();
            if crosses || room == 0 {
                break 'files;
            }
        }
    }
    (counts, (all - room) as u64)
}

/// Rows that a test wrote as JSON, three at a time: what the binding does with parquet.
struct Rows(std::vec::IntoIter<String>);

impl Feed for Rows {
    fn next(&mut self, _most: usize, take: &mut dyn FnMut(&[u8]) -> bool) -> Result<bool> {
        let before = self.0.len();
        Ok(self.0.by_ref().take(3).all(|row| take(row.as_bytes())) && before > 3)
    }

    fn share_done(&self) -> f64 {
        0.5
    }
}

fn spec(paths: Vec<PathBuf>) -> InputSpec {
    let open = |path: &Path, field: &str| -> Result<Box<dyn Feed>> {
        assert_eq!(field, "text");
        let rows: Vec<String> = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        Ok(Box::new(Rows(rows.into_iter())))
    };
    InputSpec { paths, open_feed: Some(Arc::new(open)), ..InputSpec::default() }
}

fn text() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        6 => "[a-d]{1,6} ", 2 => "[a-d]{1,3}", 2 => Just(EOT.to_string()), 1 => Just("<|endo".to_string()),
        1 => Just(SPECIALS[1].to_string()), 1 => "\\s{1,3}", 1 => "[0-9é日😀]{1,4}", 1 => any::<char>().prop_map(String::from),
    ];
    prop::collection::vec(part, 0..30).prop_map(|parts| parts.concat())
}

fn file() -> impl Strategy<Value = File> {
    let doc = prop_oneof![
        text().prop_filter("an empty file is an error", |t| !t.is_empty()).prop_map(Doc::Text),
        prop::collection::vec(prop::option::weighted(0.8, text()), 1..12)
            .prop_filter("empty", |l| l.len() > 1 || l[0].is_some())
            .prop_map(Doc::Jsonl),
        prop::collection::vec(text(), 1..12).prop_map(Doc::Rows),
    ];
    (doc, prop::sample::select(vec!["", "gz", "zst", "xz", "bz2"]), 0usize..=100)
        .prop_map(|(doc, packing, member)| File { doc, packing, member })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_input_gives_what_its_documents_give(
        files in prop::collection::vec(file(), 1..4),
        pattern in prop::sample::select(vec!["gpt2", "cl100k", r"\w+|\s"]),
        limit in prop::option::of(1u64..150),
        share in prop::option::of(prop::sample::select(vec![0.1, 0.5, 0.9, 1.0])),
        seed in any::<u64>(),
        chunk in prop::sample::select(vec![1usize, 2, 3, 7, 16, 64, 1024, 1 << 20]),
        threads in prop::sample::select(vec![1usize, 2, 3, 8]),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let paths = files.iter().enumerate().map(|(place, file)| file.write(folder.path(), place)).collect();
        let spec = InputSpec { limit_bytes: limit, sample: share, seed, ..spec(paths) };
        let splitter = splitter(pattern);
        let inputs = Inputs::of(spec.clone()).unwrap();
        let counted = count_files(&inputs, &splitter, TextPolicy::Error, threads, chunk, &Progress::default()).unwrap();
        let (expected, bytes) = naive(&files, &spec, &splitter);
        prop_assert_eq!(counted.into_sorted().into_iter().collect::<BTreeMap<_, _>>(), expected);
        prop_assert_eq!(inputs.text_bytes(), bytes);
    }

    #[test]
    fn a_reader_goes_on_where_another_one_stopped(
        files in prop::collection::vec(file(), 1..4),
        limit in prop::option::of(1u64..150),
        share in prop::option::of(prop::sample::select(vec![0.5, 0.9])),
        seed in any::<u64>(),
        chunks in prop::collection::vec(prop::sample::select(vec![1usize, 3, 16, 64, 1024]), 2),
        stops in prop::collection::vec(0usize..6, 3),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let paths = files.iter().enumerate().map(|(place, file)| file.write(folder.path(), place)).collect();
        let spec = InputSpec { limit_bytes: limit, sample: share, seed, ..spec(paths) };
        let (splitter, inputs) = (splitter("gpt2"), Inputs::of(spec.clone()).unwrap());
        let (mut counts, mut position, mut chunk) = (BTreeMap::new(), Some(Position::default()), Chunk::default());
        for (i, stop) in stops.into_iter().chain([usize::MAX]).enumerate() {
            let Some(start) = position else { break };
            let reader = |progress| {
                let reader = ChunkReader::new(&inputs, &splitter, chunks[i % 2]).stopped_by(progress);
                if i == 0 { reader } else { reader.starting_at(start) }
            };
            let broken_off = |reader: &ChunkReader<'_>, chunk: &mut Chunk| {
                let before = reader.position();
                if before.is_some() {
                    assert!(matches!(reader.next(chunk), Err(Error::Interrupted)));
                }
                assert!(matches!(reader.next(chunk), Ok(false)));
                assert_eq!(reader.position(), before);
            };
            let (stopped, progress) = (Progress::default(), Progress::default());
            stopped.stop();
            broken_off(&reader(&stopped), &mut chunk);
            let (reader, mut read) = (reader(&progress), 0);
            while read < stop && reader.next(&mut chunk).unwrap() {
                read += 1;
                for (_, text) in chunk.texts() {
                    reader.splitter(&chunk).split_bytes(text, TextPolicy::Error, |piece| if let Piece::Word(word) = piece {
                        *counts.entry(word.to_vec()).or_insert(0u64) += 1;
                    }).unwrap();
                }
            }
            position = reader.position();
            progress.stop();
            broken_off(&reader, &mut chunk);
        }
        prop_assert_eq!(position, None);
        let (expected, bytes) = naive(&files, &spec, &splitter);
        prop_assert_eq!(counts, expected);
        prop_assert_eq!(inputs.text_bytes(), bytes);
    }
}

/// Ten rows of three bytes, one at a time; somebody stops the reader while the given one is read.
struct StoppedAt(u64, u64, Arc<Progress>);

impl Feed for StoppedAt {
    fn next(&mut self, _most: usize, take: &mut dyn FnMut(&[u8]) -> bool) -> Result<bool> {
        self.0 += 1;
        if self.0 == self.1 {
            self.2.stop();
        }
        take(b"a b");
        Ok(self.0 < 10)
    }

    fn share_done(&self) -> f64 {
        0.5
    }
}

#[test]
fn rows_that_were_read_but_not_handed_out_come_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.parquet");
    fs::write(&path, "rows").unwrap();
    let splitter = splitter("gpt2");
    let at = |offset| Position { file: 0, offset, room: None };
    // Where it begins, where it is stopped, chunks of three rows that it hands out, where it goes on.
    for (from, stop, chunks, to) in [(0, 5, 1, 3), (0, 6, 2, 6), (0, 1, 0, 0), (3, 2, 0, 3), (3, 5, 0, 3), (3, 8, 1, 6)]
    {
        let progress = Arc::new(Progress::default());
        let shared = Arc::clone(&progress);
        let open =
            move |_: &Path, _: &str| -> Result<Box<dyn Feed>> { Ok(Box::new(StoppedAt(0, stop, Arc::clone(&shared)))) };
        let inputs = InputSpec { open_feed: Some(Arc::new(open)), ..InputSpec::of(std::slice::from_ref(&path)) };
        let inputs = Inputs::of(inputs).unwrap();
        let reader = ChunkReader::new(&inputs, &splitter, 9).stopped_by(&progress).starting_at(at(from));
        let mut chunk = Chunk::default();
        for _ in 0..chunks {
            assert!(reader.next(&mut chunk).unwrap());
        }
        assert!(matches!(reader.next(&mut chunk), Err(Error::Interrupted)));
        assert_eq!((reader.position(), inputs.text_bytes()), (Some(at(to)), 9 * chunks));
    }
}

fn count(path: &Path) -> Result<Vec<(Vec<u8>, u64)>> {
    let inputs = Inputs::open(&[path.to_path_buf()])?;
    let splitter = splitter("gpt2");
    count_files(&inputs, &splitter, TextPolicy::Error, 2, 64, &Progress::default()).map(WordCounts::into_sorted)
}

fn message(result: Result<impl std::fmt::Debug>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn a_packed_file_cut_anywhere_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let text: String = (0..400).map(|i| format!("word{} ", i * 7919 % 1000)).collect();
    for packing in PACKINGS {
        let first = pack(packing, &text.as_bytes()[..1000]);
        let whole = [first.clone(), pack(packing, &text.as_bytes()[1000..])].concat();
        let path = folder.path().join(format!("cut.txt.{packing}"));
        for cut in 1..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            if cut == first.len() {
                // Whole members are a whole file.
                count(&path).unwrap();
                continue;
            }
            let error = message(count(&path));
            assert!(error.contains(&format!("cut.txt.{packing}")), "{cut}: {error}");
            let said = ["end in the middle", "its first bytes are not"].iter().any(|words| error.contains(words));
            assert!(said, "{packing} cut at {cut} of {}: {error}", whole.len());
        }
        fs::write(&path, &whole).unwrap();
        assert_eq!(count(&path).unwrap().iter().map(|word| word.1).sum::<u64>(), 801);
    }
}

#[test]
fn a_byte_that_was_changed_is_found_wherever_it_decides_anything() {
    let folder = tempfile::tempdir().unwrap();
    let text: String = (0..300).map(|i| format!("word{} ", i * 7919 % 1000)).collect();
    for packing in PACKINGS {
        let path = folder.path().join(format!("x.txt.{packing}"));
        let whole = pack(packing, text.as_bytes());
        fs::write(&path, &whole).unwrap();
        let right = count(&path).unwrap();
        let mut refused = 0;
        for at in 0..whole.len() {
            let mut changed = whole.clone();
            changed[at] ^= 0x55;
            fs::write(&path, &changed).unwrap();
            match count(&path) {
                // The name or the time in a header of gzip.
                Ok(found) => assert_eq!(found, right, "{packing}: byte {at}"),
                Err(error) => {
                    assert!(error.to_string().contains(&format!("x.txt.{packing}: ")), "{error}");
                    refused += 1;
                }
            }
        }
        assert!(refused > whole.len() * 9 / 10, "{packing}: {refused} of {}", whole.len());
    }
}

#[test]
fn what_follows_a_packed_file_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    for packing in PACKINGS {
        let path = folder.path().join(format!("x.{packing}"));
        fs::write(&path, [pack(packing, b"some text"), b"this is no member".to_vec()].concat()).unwrap();
        let error = message(count(&path));
        // xz looks at what follows before it hands out the text.
        let text = if packing == "xz" { "after 0 bytes" } else { "after 9 bytes of text" };
        assert!(error.contains("corrupt") && error.contains(text), "{packing}: {error}");
    }
}

#[test]
fn first_bytes_decide_and_names_must_not_lie() {
    let folder = tempfile::tempdir().unwrap();
    for packing in PACKINGS {
        let path = folder.path().join(format!("named-{packing}.txt"));
        fs::write(&path, pack(packing, b"one two two")).unwrap();
        let words = count(&path).unwrap();
        assert_eq!(words[0], (b" two".to_vec(), 2), "{packing}");
        let path = folder.path().join(format!("plain.{packing}"));
        fs::write(&path, "one two").unwrap();
        assert!(message(count(&path)).contains("its first bytes are not"), "{packing}");
        let path = folder.path().join(format!("nothing.{packing}"));
        fs::write(&path, pack(packing, b"")).unwrap();
        assert!(message(count(&path)).contains("unpacks to nothing"), "{packing}");
    }
    for name in ["a.zip", "a.tar.gz", "a.tgz", "a.7z", "a.parquet.gz"] {
        let path = folder.path().join(name);
        fs::write(&path, "whatever").unwrap();
        assert!(message(count(&path)).contains("expected"), "{name}");
    }
}

#[test]
fn a_file_that_unpacks_to_a_thousand_times_its_size_stays_in_its_chunks() {
    let folder = tempfile::tempdir().unwrap();
    let text = "a few words, again and again\n".repeat(1_000_000);
    let jsonl = format!("{{\"text\": \"{}\"}}\n", "a few words. ".repeat(1000)).repeat(2000);
    let splitter = splitter("gpt2");
    for (name, text) in [("bomb.txt", &text), ("bomb.jsonl", &jsonl)] {
        for packing in ["gz", "zst"] {
            let path = folder.path().join(format!("{name}.{packing}"));
            fs::write(&path, pack(packing, text.as_bytes())).unwrap();
            let inputs = Inputs::open(&[path]).unwrap();
            assert!(inputs.total_bytes() * 50 < text.len() as u64);
            let reader = ChunkReader::new(&inputs, &splitter, 1 << 16);
            let (mut chunk, mut used, mut texts) = (Chunk::default(), 0, 0);
            while reader.next(&mut chunk).unwrap() {
                assert!(chunk.bytes.capacity() <= 1 << 18, "{}", chunk.bytes.capacity());
                used += chunk.read_bytes;
                texts += chunk.texts().map(|text| text.1.len()).sum::<usize>();
            }
            assert_eq!(
                (used, texts as u64),
                (inputs.total_bytes(), inputs.text_bytes()),
                "all of the file is accounted for"
            );
        }
    }
}

#[test]
fn a_piece_without_a_border_is_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let splitter = splitter("gpt2");
    for (name, text, words) in [
        (
            "word.txt",
            format!("one two {}", "a".repeat(5000)),
            "no certain border between words in 1000 bytes from byte 7",
        ),
        (
            "line.jsonl",
            format!("{{\"text\": \"b\"}}\n{{\"text\": \"{}\"}}", "a".repeat(5000)),
            "line 2: longer than 1000 bytes",
        ),
    ] {
        let path = folder.path().join(name);
        fs::write(&path, &text).unwrap();
        let inputs = Inputs::open(&[path]).unwrap();
        let read = |most| -> Result<()> {
            let reader = ChunkReader::new(&inputs, &splitter, 16).with_most_uncut(most);
            let mut chunk = Chunk::default();
            loop {
                match reader.next(&mut chunk) {
                    Ok(true) => assert!(chunk.bytes.len() <= most),
                    Ok(false) => return Ok(()),
                    Err(error) => {
                        let more = reader.next(&mut Chunk::default()).unwrap();
                        assert!(!more, "nobody reads on behind an error");
                        return Err(error);
                    }
                }
            }
        };
        let error = message(read(1000));
        assert!(error.contains(words), "{error}");
        read(6000).unwrap();
    }
}

#[test]
fn bad_records_are_named_by_file_and_line_whatever_the_chunks() {
    let folder = tempfile::tempdir().unwrap();
    let good = "{\"text\": \"fine\"}\n\n".repeat(3);
    let path = folder.path().join("x.jsonl");
    for (line, words) in [
        (&b"{\"text\": \"open"[..], "x.jsonl: line 7: column"),
        (b"{\"body\": \"b\"}", "x.jsonl: line 7: no field \"text\""),
        (b"{\"text\": 5}", "x.jsonl: line 7: invalid type: integer `5`, expected a text in field \"text\""),
        (b"{\"text\": \"abc\xff\"}", "x.jsonl: line 7: byte 3 of the text: invalid UTF-8 (byte 0xff)"),
        (b"{\"text\": \"abc\\ud800\"}", "x.jsonl: line 7: byte 3 of the text: invalid UTF-8"),
    ] {
        fs::write(&path, [good.as_bytes(), line, b"\n{\"text\": \"fine\"}"].concat()).unwrap();
        for (chunk, threads) in [(1, 1), (20, 3), (1 << 20, 2)] {
            let inputs = Inputs::open(std::slice::from_ref(&path)).unwrap();
            let counted =
                count_files(&inputs, &splitter("gpt2"), TextPolicy::Error, threads, chunk, &Progress::default());
            let error = message(counted);
            assert!(error.contains(words), "{chunk}: {error}");
        }
    }
    // A byte order mark, line ends of Windows, none at the end.
    fs::write(&path, "\u{feff}{\"text\": \"a b\"}\r\n{\"text\": \"a\"}").unwrap();
    assert_eq!(count(&path).unwrap(), [(b"a".to_vec(), 2), (b" b".to_vec(), 1)]);
}

#[test]
fn folders_and_globs_are_sorted_and_hidden_files_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    for name in
        ["b.txt", "a/z.md", "a/B.JSONL", "a/c.txt", "a.text", ".hidden.txt", ".h/x.txt", "a/no.csv", "a/x.csv.gz"]
    {
        fs::create_dir_all(root.join(name).parent().unwrap()).unwrap();
        fs::write(root.join(name), "{\"text\": \"a\"}").unwrap();
    }
    fs::write(root.join("a/wiki.gz"), pack("gz", b"text")).unwrap();
    let names = |paths: &[&str]| -> Result<Vec<String>> {
        let inputs = Inputs::open(&paths.iter().map(|path| root.join(path)).collect::<Vec<_>>())?;
        Ok(inputs.paths().map(|path| path.strip_prefix(root).unwrap().to_string_lossy().into()).collect())
    };
    let all = ["a/B.JSONL", "a/c.txt", "a/wiki.gz", "a/z.md", "a.text", "b.txt"];
    assert_eq!(names(&[""]).unwrap(), all);
    assert_eq!(names(&["b.txt", "a"]).unwrap(), ["b.txt", "a/B.JSONL", "a/c.txt", "a/wiki.gz", "a/z.md"]);
    assert_eq!(names(&["*.t*"]).unwrap(), ["a.text", "b.txt"]);
    assert_eq!(names(&["**/*.txt"]).unwrap(), ["a/c.txt", "b.txt"]);
    assert_eq!(names(&["a/[cz].*", "a/no.csv"]).unwrap(), ["a/c.txt", "a/z.md", "a/no.csv"]);
    assert_eq!(names(&["?"]).unwrap(), all[..4]);
    assert!(message(names(&["*.zst"])).contains("no file matches"));
    assert!(message(names(&["a/[c"])).contains("expected"));
    fs::create_dir(root.join("none")).unwrap();
    assert!(message(names(&["none"])).contains("no file with a known ending"));
    fs::write(root.join("[odd].txt"), "text").unwrap();
    assert_eq!(names(&["[odd].txt"]).unwrap(), ["[odd].txt"]);
    fs::create_dir_all(root.join("deep/er")).unwrap();
    fs::write(root.join("deep/er/x.txt"), "text").unwrap();
    fs::write(root.join("deep/y.txt"), "text").unwrap();
    // Folders that match, and the files in them, which match again.
    assert_eq!(names(&["deep/**/*"]).unwrap(), ["deep/er/x.txt", "deep/y.txt"]);
    assert_eq!(names(&["dee[p]*", "deep/y.txt"]).unwrap(), ["deep/er/x.txt", "deep/y.txt", "deep/y.txt"]);
    fs::write(root.join("a/empty.txt"), "").unwrap();
    assert!(message(names(&["a"])).contains("empty.txt: found in a directory of the inputs: empty file"));
}

#[test]
fn what_cannot_work_is_said_before_anything_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.txt");
    fs::write(&path, "text").unwrap();
    let of = |change: fn(&mut InputSpec)| {
        let mut spec = InputSpec::of(std::slice::from_ref(&path));
        change(&mut spec);
        message(Inputs::of(spec))
    };
    assert!(of(|s| s.paths.clear()).contains("at least one"));
    assert!(of(|s| s.limit_bytes = Some(0)).contains("limit_bytes: found 0"));
    for share in [0.0, -0.1, 1.5, f64::NAN] {
        let spec = InputSpec { sample: Some(share), ..InputSpec::of(std::slice::from_ref(&path)) };
        assert!(message(Inputs::of(spec)).contains("sample: found"));
    }
    assert!(of(|s| s.field = Some("body".into())).contains("text files only"));
    assert!(of(|s| s.paths = vec!["-".into(), "-".into()]).contains("twice"));
    fs::write(folder.path().join("x.parquet"), "PAR1").unwrap();
    let parquet = InputSpec::of(&[folder.path().join("x.parquet")]);
    assert!(message(Inputs::of(parquet)).contains("no reader"));
}

#[test]
fn records_are_encoded_one_by_one_and_ended() {
    let words = [(b"the".to_vec(), 9), (b" the".to_vec(), 12)];
    let merges =
        train(&words.iter().cloned().collect(), &Options::new(9, TieBreak::Lexicographic), &Progress::default())
            .unwrap();
    let encoder = Encoder::new(Vocab::from_training(merges, &[EOT.into()], "gpt2").unwrap()).unwrap();
    let eot = encoder.vocab().eot().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let texts = ["the", " the the", "", "a<|endoftext|>b", "\n"];
    let lines: Vec<String> = texts.iter().map(|text| serde_json::json!({ "text": text }).to_string()).collect();
    let path = folder.path().join("x.jsonl.zst");
    fs::write(&path, pack("zst", lines.join("\n").as_bytes())).unwrap();
    for (append_eot, ends) in [(None, true), (Some(true), true), (Some(false), false)] {
        let mut expected = vec![];
        for text in texts {
            encoder.encode(text, Allowed::None, &mut expected).unwrap();
            expected.extend(ends.then_some(eot));
        }
        for (chunk_bytes, threads) in [(1, 1), (1, 3), (30, 2), (1 << 20, 2)] {
            let out = folder.path().join("out.bin");
            let policy = TextPolicy::Error;
            let options =
                EncodeOptions { append_eot, policy, overwrite: true, threads, chunk_bytes, ..EncodeOptions::default() };
            let inputs = Inputs::open(std::slice::from_ref(&path)).unwrap();
            let made = encode_files(&encoder, &inputs, &out, &options, &Progress::default()).unwrap();
            let manifest = &made.manifests[0].1;
            let bytes = fs::read(&out).unwrap();
            let ids: Vec<u32> = bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]).into()).collect();
            assert_eq!(ids, expected);
            let length: usize = texts.iter().map(|text| text.len()).sum();
            assert_eq!(
                (manifest.documents, manifest.text_bytes, manifest.sources[0].bytes),
                (5, length as u64, length as u64)
            );
        }
    }
}
