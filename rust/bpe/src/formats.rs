//! Tokenizer files, read and written: Hugging Face's `tokenizer.json` (native), `vocab.json` + `merges.txt`
//! as GPT-2 has them, and `.tiktoken` ranks (`docs/formats.md`).
//!
//! In: bytes of a file. Out: a checked [`Vocab`], and back. The kind of a file is told by its content, never
//! by its name. What Hugging Face's format can say and this core cannot do is refused by name.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use foldhash::fast::FixedState;
use serde_json::{Map, Value, json};

use crate::atomic::{check_output, write_file};
use crate::error::{Error, Result};
use crate::pretokenize::Pattern;
use crate::train::{TokenId, byte_alphabet};
use crate::vocab::{Merge, Vocab};

/// The formats that can be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Hugging Face's `tokenizer.json`.
    TokenizerJson,
    /// A folder with GPT-2's `vocab.json` and `merges.txt`.
    VocabMerges,
    /// tiktoken's ranks: a line a token, base64 and rank; neither pattern nor special tokens.
    Tiktoken,
}

impl Format {
    /// The format of a name: `tokenizer.json`, `vocab+merges` or `tiktoken`.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "tokenizer.json" => Ok(Self::TokenizerJson),
            "vocab+merges" => Ok(Self::VocabMerges),
            "tiktoken" => Ok(Self::Tiktoken),
            _ => {
                Err(Error::Config(format!("format: found {name:?}; expected tokenizer.json, vocab+merges or tiktoken")))
            }
        }
    }
}

/// Special tokens as a caller names them; those without an id get the next free ones.
pub type SpecialNames = Vec<(String, Option<TokenId>)>;

/// Reads a tokenizer of any format; a folder holds `tokenizer.json` or `vocab.json` + `merges.txt`.
///
/// `specials` adds special tokens (needed by `.tiktoken`, which has none), `pattern` overrides the file's
/// (needed by `.tiktoken`, which has none; `vocab.json` + `merges.txt` mean GPT-2's).
pub fn read(path: &Path, specials: Option<SpecialNames>, pattern: Option<&str>) -> Result<Vocab> {
    let path = if path.is_dir() { find_in_folder(path)? } else { path.to_path_buf() };
    let bytes = fs::read(&path).map_err(|e| Error::io(&path, &e))?;
    let place = path.display().to_string();
    if bytes.is_empty() {
        return Err(Error::File { path, what: "empty file (0 bytes); expected a tokenizer".into() });
    }
    if bytes.iter().find(|b| !b.is_ascii_whitespace()) != Some(&b'{') {
        let pattern = pattern.ok_or_else(|| {
            Error::Config(format!("{place}: a file of tiktoken ranks does not name its pattern; expected pattern= (gpt2, cl100k, o200k or a regular expression)"))
        })?;
        return from_tiktoken(&bytes, &place, &specials.unwrap_or_default(), pattern);
    }
    let value: Value =
        serde_json::from_slice(&bytes).map_err(|e| Error::format(&place, format!("{e}; expected a JSON tokenizer")))?;
    // A plain vocabulary may well hold a token "model"; its value is an id.
    if value["model"].is_object() {
        return from_tokenizer_value(&value, &place, specials, pattern);
    }
    let merges = path.with_file_name("merges.txt");
    if !merges.is_file() {
        let what = format!("a vocabulary without merges; expected {} beside it, or a tokenizer.json", merges.display());
        return Err(Error::format(place, what));
    }
    read_vocab_and_merges(&path, &merges, specials, pattern.unwrap_or("gpt2"))
}

fn find_in_folder(folder: &Path) -> Result<PathBuf> {
    let names = ["tokenizer.json", "vocab.json"];
    let found = names.iter().map(|name| folder.join(name)).find(|path| path.is_file());
    found.ok_or_else(|| Error::File {
        path: folder.into(),
        what: "holds no tokenizer; expected tokenizer.json, or vocab.json and merges.txt, in it".into(),
    })
}

/// Reads GPT-2's pair of files.
pub fn read_vocab_and_merges(
    vocab: &Path,
    merges: &Path,
    specials: Option<SpecialNames>,
    pattern: &str,
) -> Result<Vocab> {
    let text = |path: &Path| fs::read_to_string(path).map_err(|e| Error::io(path, &e));
    let (vocab_place, merges_place) = (vocab.display().to_string(), merges.display().to_string());
    let map: BTreeMap<String, TokenId> = serde_json::from_str(&text(vocab)?)
        .map_err(|e| Error::format(&vocab_place, format!("{e}; expected a JSON object of tokens and ids")))?;
    let alphabet = Alphabet::new();
    let mut tokens = Vec::with_capacity(map.len());
    for (token, id) in map {
        // A special token may hold characters that stand for no byte.
        tokens.push((alphabet.bytes(&token).unwrap_or_else(|| token.into_bytes()), id));
    }
    let mut pairs = Vec::new();
    for (line, text) in (1..).zip(text(merges)?.lines()) {
        if (line == 1 && text.starts_with("#version")) || text.trim().is_empty() {
            continue;
        }
        let halves = text.split_once(' ').and_then(|(a, b)| Some((alphabet.bytes(a)?, alphabet.bytes(b)?)));
        let halves = halves.ok_or_else(|| {
            Error::format(
                format!("{merges_place}: line {line}"),
                format!("found {text:?}; expected two tokens and a space"),
            )
        })?;
        pairs.push(halves);
    }
    from_parts(tokens, &pairs, specials, pattern).map_err(|e| at_place(&vocab_place, e))
}

/// Joins tokens and merges given as bytes. Tokens that are neither a byte nor a merge's result are special.
pub fn from_parts(
    tokens: Vec<(Vec<u8>, TokenId)>,
    merges: &[(Vec<u8>, Vec<u8>)],
    specials: Option<SpecialNames>,
    pattern: &str,
) -> Result<Vocab> {
    let mut ids: HashMap<&[u8], TokenId, FixedState> = HashMap::default();
    for (bytes, id) in &tokens {
        ids.insert(bytes, *id);
    }
    let mut rules = Vec::with_capacity(merges.len());
    let mut produced = vec![false; tokens.len()];
    for (rank, (a, b)) in (0u32..).zip(merges) {
        let rule = rule(rank, a, b, |bytes| ids.get(bytes).copied())?;
        if let Some(seen) = produced.get_mut(rule.id as usize) {
            *seen = true;
        }
        rules.push(rule);
    }
    let (mut ordinary, mut found) = (Vec::new(), Vec::new());
    for (bytes, id) in tokens {
        if bytes.len() == 1 || produced.get(id as usize) == Some(&true) {
            ordinary.push((bytes, id));
        } else {
            let text = String::from_utf8(bytes).map_err(|e| {
                Error::Config(format!("token {id}: {:?} is neither a byte nor a merge's result; expected one of them, or a special token's text", e.as_bytes()))
            })?;
            found.push((text, id));
        }
    }
    let specials = add_specials(&ordinary, found, specials)?;
    Vocab::new(&ordinary, rules, specials, pattern, false)
}

fn rule(rank: u32, a: &[u8], b: &[u8], id_of: impl Fn(&[u8]) -> Option<TokenId>) -> Result<Merge> {
    let missing = |bytes: &[u8]| {
        Error::Config(format!(
            "merge {rank}: {:?} is not in the vocabulary; expected merges of its tokens",
            String::from_utf8_lossy(bytes)
        ))
    };
    let joined = [a, b].concat();
    let id = |bytes: &[u8]| id_of(bytes).ok_or_else(|| missing(bytes));
    Ok(Merge { pair: (id(a)?, id(b)?), id: id(&joined)?, rank })
}

/// Adds the caller's special tokens to those of the file.
fn add_specials(
    ordinary: &[(Vec<u8>, TokenId)],
    mut found: Vec<(String, TokenId)>,
    asked: Option<SpecialNames>,
) -> Result<Vec<(String, TokenId)>> {
    for (text, id) in asked.into_iter().flatten() {
        match (found.iter().find(|special| special.0 == text), id) {
            (Some(known), Some(id)) if known.1 != id => {
                return Err(Error::Config(format!(
                    "special token {text:?}: found id {id}; expected {}, as the file has it",
                    known.1
                )));
            }
            (Some(_), _) => {}
            (None, id) => {
                let next = (ordinary.len() + found.len()) as TokenId;
                found.push((text, id.unwrap_or(next)));
            }
        }
    }
    Ok(found)
}

/// Reads a `tokenizer.json` from its text.
pub fn from_json(text: &str) -> Result<Vocab> {
    let value: Value = serde_json::from_str(text).map_err(|e| Error::format("tokenizer.json", e.to_string()))?;
    from_tokenizer_value(&value, "tokenizer.json", None, None)
}

fn from_tokenizer_value(
    value: &Value,
    place: &str,
    specials: Option<SpecialNames>,
    pattern: Option<&str>,
) -> Result<Vocab> {
    let fail = |what: String| Error::format(place, what);
    let model = &value["model"];
    if !(model["type"].is_null() || model["type"] == "BPE") {
        return Err(fail(format!("model type {}; expected \"BPE\"", model["type"])));
    }
    for field in ["truncation", "padding"] {
        if !value[field].is_null() {
            return Err(fail(format!("{field} is set; expected null")));
        }
    }
    for field in ["dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"] {
        let found = &model[field];
        if !(found.is_null() || found.as_str() == Some("") || found.as_f64() == Some(0.0)) {
            return Err(fail(format!("model.{field} is {found}; expected null")));
        }
    }
    if model["byte_fallback"] == true {
        return Err(fail("model.byte_fallback is true; expected a byte-level model".into()));
    }
    if !value["normalizer"].is_null() {
        return Err(fail(format!("normalizer {}; expected null", value["normalizer"]["type"])));
    }
    let post = &value["post_processor"];
    if !(post.is_null() || post["type"] == "ByteLevel") {
        return Err(fail(format!("post_processor {}; expected null or \"ByteLevel\"", post["type"])));
    }
    let own_pattern = pattern_of(&value["pre_tokenizer"]).map_err(fail)?;

    let alphabet = Alphabet::new();
    let mut tokens = Vec::new();
    let mut added = Vec::new();
    if !(value["added_tokens"].is_null() || value["added_tokens"].is_array()) {
        return Err(fail("added_tokens is no list; expected one".into()));
    }
    for token in value["added_tokens"].as_array().into_iter().flatten() {
        let id = token["id"].as_u64().and_then(|id| TokenId::try_from(id).ok());
        let (Some(text), Some(id)) = (token["content"].as_str(), id) else {
            return Err(fail(format!("added token {token}; expected a content and an id")));
        };
        for field in ["single_word", "lstrip", "rstrip"] {
            if token[field] == true {
                return Err(fail(format!("added token {text:?} has {field}; expected false")));
            }
        }
        added.push((text.to_string(), id));
    }
    let entries = model["vocab"]
        .as_object()
        .ok_or_else(|| fail("model.vocab is missing; expected an object of tokens and ids".into()))?;
    for (text, id) in entries {
        let id = id.as_u64().and_then(|id| TokenId::try_from(id).ok());
        let id = id.ok_or_else(|| fail(format!("token {text:?} has no id; expected a number below 2^32")))?;
        if added.iter().any(|special| &special.0 == text) {
            continue;
        }
        let bytes = alphabet
            .bytes(text)
            .ok_or_else(|| fail(format!("token {text:?} is not byte-level; expected GPT-2's byte alphabet")))?;
        tokens.push((bytes, id));
    }
    let ids: HashMap<&[u8], TokenId, FixedState> = tokens.iter().map(|(bytes, id)| (bytes.as_slice(), *id)).collect();
    let mut rules = Vec::new();
    let merges = model["merges"].as_array();
    let merges = merges.ok_or_else(|| fail("model.merges is missing; expected a list of pairs".into()))?;
    for (rank, merge) in (0u32..).zip(merges) {
        let halves = match merge {
            Value::String(text) => text.split_once(' '),
            Value::Array(two) if two.len() == 2 => two[0].as_str().zip(two[1].as_str()),
            _ => None,
        };
        let halves = halves.and_then(|(a, b)| Some((alphabet.bytes(a)?, alphabet.bytes(b)?)));
        let (a, b) = halves.ok_or_else(|| fail(format!("merge {rank}: found {merge}; expected two tokens")))?;
        rules.push(rule(rank, &a, &b, |bytes| ids.get(bytes).copied()).map_err(|e| at_place(place, e))?);
    }
    let specials = add_specials(&tokens, added, specials).map_err(|e| at_place(place, e))?;
    let ignore_merges = model["ignore_merges"] == true;
    let pattern = pattern.map_or(own_pattern, str::to_string);
    Vocab::new(&tokens, rules, specials, &pattern, ignore_merges).map_err(|e| at_place(place, e))
}

/// The pattern of a `pre_tokenizer`: `ByteLevel` alone, or `Split` by a regular expression before it.
fn pattern_of(pre: &Value) -> Result<String, String> {
    let byte_level = |p: &Value, regex: bool| {
        p["type"] == "ByteLevel" && p["add_prefix_space"] != true && p["use_regex"].as_bool().unwrap_or(true) == regex
    };
    let steps: Vec<&Value> = if pre["type"] == "Sequence" {
        pre["pretokenizers"].as_array().into_iter().flatten().collect()
    } else {
        vec![pre]
    };
    match steps[..] {
        [only] if byte_level(only, true) => return Ok("gpt2".into()),
        [split, last] if split["type"] == "Split" && byte_level(last, false) => {
            let isolated = split["behavior"] == "Isolated" && split["invert"] != true;
            if let (true, Some(regex)) = (isolated, split["pattern"]["Regex"].as_str()) {
                return Ok(regex.into());
            }
        }
        _ => {}
    }
    Err(format!(
        "pre_tokenizer {}; expected \"ByteLevel\" without a prefix space, alone or behind an isolated \"Split\" by a regular expression",
        pre["type"]
    ))
}

/// Writes a tokenizer; `VocabMerges` writes two files into the folder `path`.
pub fn write(vocab: &Vocab, path: &Path, format: Format, overwrite: bool) -> Result<()> {
    match format {
        Format::TokenizerJson => write_file(path, to_json(vocab)?.as_bytes(), overwrite),
        Format::Tiktoken => write_file(path, &to_tiktoken(vocab)?, overwrite),
        Format::VocabMerges => {
            if !path.is_dir() {
                fs::create_dir(path).map_err(|e| Error::io(path, &e))?;
            }
            let (vocab_path, merges_path) = (path.join("vocab.json"), path.join("merges.txt"));
            check_output(&vocab_path, overwrite)?;
            check_output(&merges_path, overwrite)?;
            if vocab.ignore_merges() {
                return Err(Error::Config("this vocabulary takes whole tokens before merges, which vocab.json and merges.txt cannot say; expected format tokenizer.json or tiktoken".into()));
            }
            let (json, merges) = to_vocab_and_merges(vocab)?;
            write_file(&vocab_path, json.as_bytes(), overwrite)?;
            write_file(&merges_path, merges.as_bytes(), overwrite)
        }
    }
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
    let (head, rest) = text.split_once("\"vocab\": {}").unwrap_or((text, ""));
    let (middle, tail) = rest.split_once("\"merges\": []").unwrap_or((rest, ""));
    let quoted = Alphabet::new().chars.map(|c| match c {
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
    for (_, id) in ordinary_tokens(vocab) {
        out.extend([comma, "\n      ", text_of(id), ": ", &id.to_string()]);
        comma = ",";
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
    let implied = merges_of_ranks(&ordinary_tokens(vocab).map(|(bytes, id)| (bytes.to_vec(), id)).collect::<Vec<_>>());
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

fn from_tiktoken(bytes: &[u8], place: &str, specials: &SpecialNames, pattern: &str) -> Result<Vocab> {
    let mut tokens = Vec::new();
    for (line, text) in (1..).zip(bytes.split(|&b| b == b'\n')) {
        if text.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let parsed = str::from_utf8(text).ok().and_then(|text| {
            let (token, rank) = text.trim_end().split_once(' ')?;
            Some((BASE64.decode(token).ok()?, rank.parse().ok()?))
        });
        tokens.push(parsed.ok_or_else(|| {
            Error::format(
                format!("{place}: line {line}"),
                "not a base64 token and a rank; expected tiktoken ranks, or a JSON tokenizer",
            )
        })?);
    }
    let merges = merges_of_ranks(&tokens).unwrap_or_else(|| all_splits(&tokens));
    let specials = add_specials(&tokens, Vec::new(), Some(specials.clone()))?;
    Vocab::new(&tokens, merges, specials, pattern, true).map_err(|e| at_place(place, e))
}

/// The merges that ranks imply: each token's bytes, merged by lower ranks only, must end as two tokens.
///
/// By induction this list encodes as tiktoken does: until a token's rank is reached, the bytes between two
/// borders that no merge crosses are merged as they would be alone; so where two parts that join to the token
/// are neighbours at that moment, they are the two parts listed. `None` where a token ends as more than two
/// parts (it is reached through no single merge).
fn merges_of_ranks(tokens: &[(Vec<u8>, TokenId)]) -> Option<Vec<Merge>> {
    let ids: HashMap<&[u8], TokenId, FixedState> = tokens.iter().map(|(bytes, id)| (bytes.as_slice(), *id)).collect();
    let mut longer: Vec<_> = tokens.iter().filter(|(bytes, _)| bytes.len() > 1).collect();
    longer.sort_by_key(|token| token.1);
    let mut merges = Vec::with_capacity(longer.len());
    for (rank, (bytes, id)) in (0u32..).zip(longer) {
        // Borders of the parts; joining parts i and i+1 is removing border i+1.
        let mut borders: Vec<usize> = (0..=bytes.len()).collect();
        while borders.len() > 3 {
            let joined = |w: &[usize]| ids.get(&bytes[w[0]..w[2]]).filter(|&&rank| rank < *id);
            let best = borders.windows(3).enumerate().filter_map(|(i, w)| joined(w).map(|&rank| (rank, i))).min();
            borders.remove(best?.1 + 1);
        }
        let middle = borders[1];
        let pair = (*ids.get(&bytes[..middle])?, *ids.get(&bytes[middle..])?);
        merges.push(Merge { pair, id: *id, rank });
    }
    Some(merges)
}

/// Every way to cut a token into two tokens, with the token's rank: tiktoken's own rule, word for word.
fn all_splits(tokens: &[(Vec<u8>, TokenId)]) -> Vec<Merge> {
    let ids: HashMap<&[u8], TokenId, FixedState> = tokens.iter().map(|(bytes, id)| (bytes.as_slice(), *id)).collect();
    let mut merges: Vec<Merge> = Vec::new();
    for (bytes, id) in tokens {
        for middle in 1..bytes.len() {
            if let (Some(&a), Some(&b)) = (ids.get(&bytes[..middle]), ids.get(&bytes[middle..])) {
                merges.push(Merge { pair: (a, b), id: *id, rank: *id });
            }
        }
    }
    merges.sort_by_key(|m| (m.rank, m.pair));
    merges
}

fn ordinary_tokens(vocab: &Vocab) -> impl Iterator<Item = (&[u8], TokenId)> {
    (0..vocab.len() as TokenId)
        .filter(|&id| !vocab.is_special(id))
        .filter_map(|id| vocab.token(id).map(|bytes| (bytes, id)))
}

fn at_place(place: &str, error: Error) -> Error {
    match error {
        Error::Config(what) => Error::format(place, what),
        other => other,
    }
}

/// GPT-2's printable stand-ins for bytes, both ways.
struct Alphabet {
    chars: [char; 256],
    bytes: HashMap<char, u8, FixedState>,
}

impl Alphabet {
    fn new() -> Self {
        let chars = byte_alphabet();
        let bytes = chars.iter().copied().zip(0..=255).collect();
        Self { chars, bytes }
    }

    fn text(&self, bytes: &[u8]) -> String {
        bytes.iter().map(|&b| self.chars[b as usize]).collect()
    }

    fn bytes(&self, text: &str) -> Option<Vec<u8>> {
        text.chars().map(|c| self.bytes.get(&c).copied()).collect()
    }
}
