//! Files in, files out: encoding to token files, atomic outputs, tokenizer formats.

#![allow(clippy::unwrap_used, missing_docs, reason = "a test ends where something fails")]

use std::fs;
use std::path::{Path, PathBuf};

use bytekiln_bpe::Error;
use bytekiln_bpe::atomic::AtomicFile;
use bytekiln_bpe::corpus::{EncodeOptions, encode_files};
use bytekiln_bpe::encode::{Allowed, Encoder};
use bytekiln_bpe::formats::{self, Format};
use bytekiln_bpe::input::Inputs;
use bytekiln_bpe::progress::Progress;
use bytekiln_bpe::train::{Options, TieBreak, train};
use bytekiln_bpe::vocab::Vocab;
use proptest::prelude::*;

const EOT: &str = "<|endoftext|>";

fn encoder(pattern: &str) -> Encoder {
    let words = [("the", 9), (" the", 12), (" then", 7), ("ab", 5), (" don", 3), ("'t", 3), ("aaaa", 2)];
    let words = words.map(|(word, count)| (word.as_bytes().to_vec(), count));
    let merges =
        train(&words.iter().cloned().collect(), &Options::new(20, TieBreak::Lexicographic), &Progress::default())
            .unwrap();
    Encoder::new(Vocab::from_training(merges, &[EOT.into()], pattern).unwrap()).unwrap()
}

fn options() -> EncodeOptions {
    EncodeOptions { threads: 2, ..EncodeOptions::default() }
}

fn inputs(folder: &Path, texts: &[&[u8]]) -> Inputs {
    let write = |(i, text): (usize, &&[u8])| {
        let path = folder.join(format!("{i}.txt"));
        fs::write(&path, text).unwrap();
        path
    };
    let paths: Vec<PathBuf> = texts.iter().enumerate().map(write).collect();
    Inputs::open(&paths).unwrap()
}

/// Ids of a `.npy` that this crate wrote.
fn ids(path: &Path) -> Vec<u32> {
    let bytes = fs::read(path).unwrap();
    assert_eq!(&bytes[..8], b"\x93NUMPY\x01\x00");
    assert!(bytes[..128].ends_with(b" \n") && String::from_utf8_lossy(&bytes[..128]).contains("'<u2'"));
    bytes[128..].chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]).into()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_token_file_holds_what_encoding_the_whole_gives(
        parts in prop::collection::vec(prop::sample::select(vec![" the", "then", "<|endoftext|>", "<|endof", "\n", "  ", "don't", "aaaaa", "日本", "\u{a0}", "1234"]), 1..50),
        pattern in prop::sample::select(vec!["gpt2", "cl100k", r"\w+|\s+"]),
        chunk_bytes in prop::sample::select(vec![1usize, 2, 5, 31, 1 << 20]),
        threads in prop::sample::select(vec![1usize, 2, 3, 8]),
    ) {
        let text = parts.concat();
        let encoder = encoder(pattern);
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out.npy");
        let options = EncodeOptions { chunk_bytes, threads, append_eot: Some(false), ..options() };
        let manifest = encode_files(&encoder, &inputs(folder.path(), &[text.as_bytes()]), &out, &options, &Progress::default()).unwrap().manifests.remove(0).1;
        let mut expected = vec![];
        encoder.encode(&text, Allowed::All, &mut expected).unwrap();
        prop_assert_eq!(ids(&out), expected.clone());
        prop_assert_eq!(manifest.tokens, expected.len() as u64);
        prop_assert_eq!(manifest.text_bytes as usize, text.replace(EOT, "").len());
        prop_assert_eq!(manifest.max_id, expected.iter().copied().max());
        let kept: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        prop_assert_eq!(kept.len(), 3, "only input, output and manifest: {:?}", kept);
    }
}

#[test]
fn the_last_document_of_a_file_is_ended_where_the_file_ends_documents() {
    let encoder = encoder("gpt2");
    let eot = encoder.vocab().eot().unwrap();
    for (texts, append, ends, documents) in [
        (vec!["a<|endoftext|>b"], None, 2, 2),
        (vec!["a<|endoftext|>b<|endoftext|>"], None, 2, 2),
        (vec!["a<|endoftext|>b<|endoftext|>\n"], None, 2, 2),
        (vec!["a<|endoftext|><|endoftext|>b"], None, 3, 3),
        (vec!["a<|endoftext|>b"], Some(false), 1, 2),
        (vec!["a", "b"], None, 0, 2),
        (vec!["a", "b"], Some(true), 2, 2),
    ] {
        for chunk_bytes in [1, 1 << 20] {
            let folder = tempfile::tempdir().unwrap();
            let out = folder.path().join("out.npy");
            let bytes: Vec<&[u8]> = texts.iter().map(|t| t.as_bytes()).collect();
            let options = EncodeOptions { append_eot: append, chunk_bytes, ..options() };
            let manifest =
                encode_files(&encoder, &inputs(folder.path(), &bytes), &out, &options, &Progress::default()).unwrap();
            let manifest = &manifest.manifests[0].1;
            let found = ids(&out).iter().filter(|&&id| id == eot).count();
            assert_eq!((found, manifest.documents), (ends, documents), "{texts:?} {append:?} {chunk_bytes}");
        }
    }
}

#[test]
fn invalid_text_is_named_by_file_and_offset_and_nothing_is_left() {
    let encoder = encoder("gpt2");
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.npy");
    for chunk_bytes in [3, 1 << 20] {
        let inputs = inputs(folder.path(), &[b"fine", b"good text\n\xff\xfe more"]);
        let options = EncodeOptions { chunk_bytes, ..options() };
        let error = encode_files(&encoder, &inputs, &out, &options, &Progress::default()).unwrap_err().to_string();
        assert!(error.contains("1.txt: byte offset 10: invalid UTF-8 (byte 0xff) in line 2; expected"), "{error}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "only the inputs");
    }
}

#[test]
fn an_output_is_refused_then_replaced_on_request_and_never_an_input() {
    let encoder = encoder("gpt2");
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.npy");
    let inputs = inputs(folder.path(), &[b"the then"]);
    fs::write(&out, "old").unwrap();
    let refused = encode_files(&encoder, &inputs, &out, &options(), &Progress::default());
    assert!(matches!(refused, Err(Error::Exists(_))));
    assert_eq!(fs::read(&out).unwrap(), b"old");
    let options = EncodeOptions { overwrite: true, ..options() };
    encode_files(&encoder, &inputs, &out, &options, &Progress::default()).unwrap();
    assert!(!ids(&out).is_empty());
    let own = encode_files(&encoder, &inputs, &folder.path().join("0.txt"), &options, &Progress::default());
    assert!(own.unwrap_err().to_string().contains("is one of the inputs"));
}

#[test]
fn a_second_writer_of_one_output_is_refused_and_a_dead_ones_rest_is_taken_over() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x");
    fs::write(folder.path().join(".x.partial"), "left by a killed writer").unwrap();
    let mut first = AtomicFile::create(&path, false).unwrap();
    let second = AtomicFile::create(&path, false).unwrap_err().to_string();
    assert!(second.contains("another process is writing it"), "{second}");
    first.write(b"whole").unwrap();
    assert!(!path.exists());
    first.commit().unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"whole");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn every_format_brings_the_vocabulary_back() {
    let folder = tempfile::tempdir().unwrap();
    for pattern in ["gpt2", "cl100k", "o200k", r"\w+|\W"] {
        let vocab = encoder(pattern).vocab().clone();
        let path = |name: &str| folder.path().join(name);
        formats::write(&vocab, &path("t.json"), Format::TokenizerJson, true).unwrap();
        let specials = Some(vec![(EOT.to_string(), vocab.eot())]);
        let back = formats::read(&path("t.json"), None, None).unwrap();
        assert_eq!((back.hash(), back.pattern()), (vocab.hash(), pattern));
        formats::write(&vocab, &path("pair"), Format::VocabMerges, true).unwrap();
        let back = formats::read(&path("pair"), None, Some(pattern)).unwrap();
        assert_eq!(back.hash(), vocab.hash());
        formats::write(&vocab, &path("t.tiktoken"), Format::Tiktoken, true).unwrap();
        let back = formats::read(&path("t.tiktoken"), specials.as_ref(), Some(pattern)).unwrap();
        assert_eq!(back.merges(), vocab.merges());
        assert!(formats::read(&path("t.tiktoken"), None, None).unwrap_err().to_string().contains("pattern="));
    }
}

#[test]
fn a_tokenizer_json_is_written_as_serde_json_would() {
    let every = (0..=255u8).map(|b| (vec![b, b'"', b, b'\\'], 9)).collect();
    let merges = train(&every, &Options::new(700, TieBreak::Lexicographic), &Progress::default()).unwrap();
    let none = train(
        &[(b"a".to_vec(), 1)].into_iter().collect(),
        &Options::new(9, TieBreak::Lexicographic),
        &Progress::default(),
    )
    .unwrap();
    let tricky = ["\"vocab\": {}".into(), "\"merges\": []".into()];
    for vocab in [
        Vocab::from_training(merges, &tricky, "gpt2").unwrap(),
        Vocab::from_training(none, &[], "\"merges\": \\[\\]").unwrap(),
    ] {
        let text = formats::to_json(&vocab).unwrap();
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(text, serde_json::to_string_pretty(&value).unwrap() + "\n");
        let back = formats::from_json(&text).unwrap();
        assert_eq!((back.merges(), back.specials()), (vocab.merges(), vocab.specials()));
        assert!((0..vocab.len() as u32).all(|id| back.token(id) == vocab.token(id)));
    }
}

#[test]
fn malformed_tokenizers_are_named() {
    let good = formats::to_json(encoder("gpt2").vocab()).unwrap();
    let cases = [
        (good.replace("\"BPE\"", "\"Unigram\""), "model type \"Unigram\""),
        (good.replace("\"normalizer\": null", "\"normalizer\": {\"type\": \"NFC\"}"), "normalizer \"NFC\""),
        (good.replace("\"byte_fallback\": false", "\"byte_fallback\": true"), "byte_fallback"),
        (good.replace("\"add_prefix_space\": false", "\"add_prefix_space\": true"), "pre_tokenizer \"ByteLevel\""),
        (good.replace("\"lstrip\": false", "\"lstrip\": true"), "has lstrip"),
        (
            good.replace("\"post_processor\": null", "\"post_processor\": {\"type\": \"Bert\"}"),
            "post_processor \"Bert\"",
        ),
        (good.replacen("\"!\": 33", "\"!\": 34", 1), "given twice"),
        (good.replacen("\"!\": 33,", "", 1), "expected the ids 0 to"),
        (good.replacen("\"!\": 33", "\"!!!!\": 33", 1), "byte 0x21 has no token"),
        (good.replacen("\"t\",\n        \"h\"", "\"t\",\n        \"q\"", 1), "is not in the vocabulary"),
        (good[..good.len() / 2].to_string(), "EOF"),
        (good.replace("\"vocab\": {", "\"words\": {"), "model.vocab is missing"),
    ];
    for (text, word) in cases {
        assert_ne!(text, good, "{word}: the case changes nothing");
        let error = formats::from_json(&text).unwrap_err().to_string();
        assert!(error.contains(word), "{word}: {error}");
    }
}
