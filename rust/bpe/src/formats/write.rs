//! A vocabulary as files of each format.
//!
//! In: a [`Vocab`]. Out: text, or files that take their names complete. Called by users of `formats`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Map, Value, json};

use super::Format;
use super::ranks::merges_of_ranks;
use crate::alphabet::Alphabet;
use crate::atomic::{check_output, write_file};
use crate::error::{Error, Result};
use crate::listed::Listed;
use crate::pretokenize::Pattern;
use crate::train::TokenId;
use crate::vocab::{Merge, Vocab};

/// Writes a tokenizer; `VocabMerges` and `Pretrained` write two files into the folder `path`.
pub fn write(vocab: &Vocab, path: &Path, format: Format, overwrite: bool) -> Result<()> {
    match format {
        Format::TokenizerJson => write_file(path, to_json(vocab)?.as_bytes(), overwrite),
        Format::Tiktoken => write_file(path, &to_tiktoken(vocab)?, overwrite),
        Format::Pretrained => {
            let (text, config) = (to_json(vocab)?, config(vocab)?);
            let (json_path, config_path) = in_folder(path, ["tokenizer.json", "tokenizer_config.json"], overwrite)?;
            write_file(&json_path, text.as_bytes(), overwrite)?;
            write_file(&config_path, config.as_bytes(), overwrite)
        }
        Format::VocabMerges => {
            if vocab.ignore_merges() {
                return Err(Error::Config("this vocabulary takes whole tokens before merges, which vocab.json and merges.txt cannot say; expected format tokenizer.json or tiktoken".into()));
            }
            let (json, merges) = to_vocab_and_merges(vocab)?;
            let (vocab_path, merges_path) = in_folder(path, ["vocab.json", "merges.txt"], overwrite)?;
            write_file(&vocab_path, json.as_bytes(), overwrite)?;
            write_file(&merges_path, merges.as_bytes(), overwrite)
        }
    }
}

/// Where two files go in a folder, which is made if it is missing; neither is touched if one may not be replaced.
fn in_folder(folder: &Path, names: [&str; 2], overwrite: bool) -> Result<(PathBuf, PathBuf)> {
    if !folder.is_dir() {
        fs::create_dir(folder).map_err(|e| Error::io(folder, &e))?;
    }
    let [first, second] = names.map(|name| folder.join(name));
    check_output(&first, overwrite)?;
    check_output(&second, overwrite)?;
    Ok((first, second))
}

/// What Hugging Face's `AutoTokenizer` reads beside the `tokenizer.json`: its class, its special tokens by their part,
/// and that decoded text is left as it is.
fn config(vocab: &Vocab) -> Result<String> {
    let text = |id: TokenId| String::from_utf8_lossy(vocab.token(id).unwrap_or_default()).into_owned();
    let eot = vocab.eot().map(text);
    let value = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": false,
        "bos_token": eot,
        "eos_token": eot,
    });
    let text =
        serde_json::to_string_pretty(&value).map_err(|e| Error::format("tokenizer_config.json", e.to_string()))?;
    Ok(text + "\n")
}

/// The text of a `tokenizer.json`; equal vocabularies give equal bytes.
pub fn to_json(vocab: &Vocab) -> Result<String> {
    if vocab.merges().windows(2).any(|w| w[0].rank >= w[1].rank) {
        return Err(Error::Config("several merges of this vocabulary share a priority, which a tokenizer.json cannot say; expected format tiktoken".into()));
    }
    let added: Vec<Value> = vocab
        .specials()
        .iter()
        .map(|(text, id)| {
            json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    let byte_level = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let pattern = Pattern::new(vocab.pattern())?;
    let pre_tokenizer = if pattern.name() == "gpt2" {
        byte_level(true)
    } else {
        let split =
            json!({"type": "Split", "pattern": {"Regex": pattern.source()}, "behavior": "Isolated", "invert": false});
        json!({"type": "Sequence", "pretokenizers": [split, byte_level(false)]})
    };
    let value = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": null,
        "decoder": byte_level(true),
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": vocab.ignore_merges(), "vocab": {}, "merges": [],
        },
    });
    let mut text = serde_json::to_string_pretty(&value).map_err(|e| Error::format("tokenizer.json", e.to_string()))?;
    text.push('\n');
    Ok(with_tokens(&text, vocab))
}

/// Puts vocabulary and merges into a `tokenizer.json` that has none, as `serde_json` would write them: as values of its
/// own they took longer than learning to merge.
fn with_tokens(text: &str, vocab: &Vocab) -> String {
    // Hugging Face's library numbers added tokens on from the vocabulary, whatever ids they have, unless they are in it.
    let first = ordinary_tokens(vocab).count() as TokenId;
    let in_place = (first..).zip(vocab.specials()).all(|(next, special)| special.1 == next);
    let quoted_special = |(text, id): &(String, TokenId)| (*id, Value::from(text.as_str()).to_string());
    let specials: BTreeMap<TokenId, String> =
        if in_place { BTreeMap::new() } else { vocab.specials().iter().map(quoted_special).collect() };
    let (head, rest) = text.split_once("\"vocab\": {}").unwrap_or((text, ""));
    let (middle, tail) = rest.split_once("\"merges\": []").unwrap_or((rest, ""));
    let quoted = Alphabet::new().chars().map(|c| match c {
        '"' | '\\' => format!("\\{c}"),
        _ => c.to_string(), // the alphabet has no control characters
    });
    // Each token's text is made once: it stands in three places of the file, on average.
    let (mut texts, mut ends) = (String::new(), Vec::with_capacity(vocab.len()));
    for id in 0..vocab.len() as TokenId {
        texts.push('"');
        texts.extend(vocab.token(id).unwrap_or_default().iter().map(|&byte| quoted[byte as usize].as_str()));
        texts.push('"');
        ends.push(texts.len());
    }
    let text_of = |id: TokenId| {
        let id = id as usize;
        &texts[if id == 0 { 0 } else { ends[id - 1] }..ends[id]]
    };
    let mut out = String::with_capacity(text.len() + 100 * vocab.len());
    out.push_str(head);
    out.push_str("\"vocab\": {");
    let mut comma = "";
    for id in 0..vocab.len() as TokenId {
        let special = specials.get(&id);
        if !vocab.is_special(id) || special.is_some() {
            let text = special.map_or(text_of(id), String::as_str);
            out.extend([comma, "\n      ", text, ": ", &id.to_string()]);
            comma = ",";
        }
    }
    out.push_str(if comma.is_empty() { "}" } else { "\n    }" });
    out.push_str(middle);
    out.push_str("\"merges\": [");
    comma = "";
    for merge in vocab.merges() {
        let (a, b) = merge.pair;
        out.extend([comma, "\n      [\n        ", text_of(a), ",\n        ", text_of(b), "\n      ]"]);
        comma = ",";
    }
    out.push_str(if comma.is_empty() { "]" } else { "\n    ]" });
    out.push_str(tail);
    out
}

fn to_vocab_and_merges(vocab: &Vocab) -> Result<(String, String)> {
    let alphabet = Alphabet::new();
    let mut entries = Map::new();
    for (bytes, id) in ordinary_tokens(vocab) {
        entries.insert(alphabet.text(bytes), id.into());
    }
    for (text, id) in vocab.specials() {
        if vocab.id_of(text.as_bytes()).is_some() {
            return Err(Error::Config(format!(
                "special token {text:?}: has the bytes of an ordinary token, which vocab.json cannot tell apart; expected format tokenizer.json"
            )));
        }
        entries.insert(text.clone(), (*id).into());
    }
    let mut merges = String::from("#version: 0.2\n");
    for merge in vocab.merges() {
        let text = |id: TokenId| alphabet.text(vocab.token(id).unwrap_or_default());
        merges.extend([&text(merge.pair.0), " ", &text(merge.pair.1), "\n"]);
    }
    let json = serde_json::to_string(&entries).map_err(|e| Error::format("vocab.json", e.to_string()))?;
    Ok((json, merges))
}

/// tiktoken's ranks. Rank and id are one there, so merges must come in the order of their results.
fn to_tiktoken(vocab: &Vocab) -> Result<Vec<u8>> {
    let (tokens, ids): (Vec<_>, Vec<_>) = ordinary_tokens(vocab).unzip();
    let implied = merges_of_ranks(&Listed::new(tokens.into_iter().collect(), ids)?);
    let pairs = |merges: &[Merge]| merges.iter().map(|m| (m.pair, m.id)).collect::<Vec<_>>();
    if !vocab.ignore_merges() && implied.as_deref().map(pairs) != Some(pairs(vocab.merges())) {
        return Err(Error::Config("these merges do not follow from the order of their tokens, which is all that a .tiktoken file says; expected format tokenizer.json".into()));
    }
    let mut out = Vec::new();
    for (bytes, id) in ordinary_tokens(vocab) {
        out.extend_from_slice(format!("{} {id}\n", BASE64.encode(bytes)).as_bytes());
    }
    Ok(out)
}

fn ordinary_tokens(vocab: &Vocab) -> impl Iterator<Item = (&[u8], TokenId)> {
    (0..vocab.len() as TokenId)
        .filter(|&id| !vocab.is_special(id))
        .filter_map(|id| vocab.token(id).map(|bytes| (bytes, id)))
}
