//! Hugging Face's `tokenizer.json`, read.
//!
//! In: its text. Out: a [`Vocab`], or an error that names what the format can say and this core cannot do.

use std::collections::HashMap;

use foldhash::fast::FixedState;
use serde::de::{DeserializeSeed, Deserializer, MapAccess, Visitor};
use serde_json::{Map, Value};

use super::listing::{Halves, Seed, Speller, Tokens, named};
use super::parts::{add_specials, rules};
use super::{MOST_BYTES, SpecialNames, at_place, text_of, too_large};
use crate::alphabet::Alphabet;
use crate::error::{Error, Result};
use crate::listed::Listed;
use crate::train::TokenId;
use crate::vocab::Vocab;

/// Reads a `tokenizer.json` from its text.
pub fn from_json(text: &str) -> Result<Vocab> {
    let place = "tokenizer.json";
    if text.len() > MOST_BYTES {
        return Err(too_large(place, text.len()));
    }
    let none = || Error::format(place, "model is missing; expected an object with vocab and merges");
    from_tokenizer_json(text.as_bytes(), place, None, None)?.ok_or_else(none)
}

/// The same of a file's bytes; `None` where it has no `model`.
pub fn from_tokenizer_json(
    bytes: &[u8],
    place: &str,
    specials: Option<&SpecialNames>,
    pattern: Option<&str>,
) -> Result<Option<Vocab>> {
    let alphabet = Alphabet::new();
    let mut speller = Speller::new(&alphabet);
    // Checked as a whole, and not each text by itself.
    let text = text_of(bytes, place)?;
    let mut parser = serde_json::Deserializer::from_str(text);
    let read = Top(&mut speller).deserialize(&mut parser).and_then(|top| parser.end().map(|()| top));
    let (top, model) = read.map_err(|e| named(place, &e))?;
    let Some(model) = model else { return Ok(None) };
    vocab_of(&top, model, &alphabet, specials, pattern).map(Some).map_err(|e| at_place(place, e))
}

/// `model`: what is large in lists of its own.
#[derive(Default)]
struct Model {
    fields: Map<String, Value>,
    tokens: Option<Tokens>,
    halves: Option<Halves>,
}

/// The whole file: fields, and the model where there is one.
struct Top<'a, 's>(&'a mut Speller<'s>);

impl<'de> DeserializeSeed<'de> for Top<'_, '_> {
    type Value = (Map<String, Value>, Option<Model>);

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Top<'_, '_> {
    type Value = (Map<String, Value>, Option<Model>);

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object: a tokenizer.json, or tokens and ids")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
        let (mut fields, mut model, mut name) = (Map::new(), None, String::new());
        while entries.next_key_seed(Name(&mut name))?.is_some() {
            if name == "model" {
                once(&name, model.is_some())?;
                entries.next_value_seed(ModelSeed { speller: &mut *self.0, into: &mut model })?;
            } else {
                let value = entries.next_value()?;
                // The names of a plain vocabulary are tokens and may be any number: nothing is kept of it.
                if !matches!(value, Value::Number(_)) {
                    once(&name, fields.insert(name.clone(), value).is_some())?;
                }
            }
        }
        Ok((fields, model))
    }
}

/// The name of a field, in room that is used again: a plain vocabulary has tens of thousands.
struct Name<'a>(&'a mut String);

impl<'de> DeserializeSeed<'de> for Name<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Name<'_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a field's name")
    }

    fn visit_str<E>(self, name: &str) -> Result<(), E> {
        self.0.clear();
        self.0.push_str(name);
        Ok(())
    }
}

fn once<E: serde::de::Error>(name: &str, again: bool) -> Result<(), E> {
    if again { Err(E::custom(format!("{name:?} is there twice; expected each field once"))) } else { Ok(()) }
}

struct ModelSeed<'a, 's> {
    speller: &'a mut Speller<'s>,
    into: &'a mut Option<Model>,
}

impl<'de> DeserializeSeed<'de> for ModelSeed<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for ModelSeed<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a model: an object with vocab and merges")
    }

    /// In a plain vocabulary "model" is a token.
    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<(), A::Error> {
        let (model, mut name) = (self.into.get_or_insert_default(), String::new());
        while entries.next_key_seed(Name(&mut name))?.is_some() {
            let speller = &mut *self.speller;
            match name.as_str() {
                "vocab" => {
                    once(&name, model.tokens.is_some())?;
                    entries.next_value_seed(Seed { speller, into: &mut model.tokens })?;
                }
                "merges" => {
                    once(&name, model.halves.is_some())?;
                    entries.next_value_seed(Seed { speller, into: &mut model.halves })?;
                }
                _ => once(&name, model.fields.insert(name.clone(), entries.next_value()?).is_some())?,
            }
        }
        Ok(())
    }
}

/// A field, null where it is missing.
fn field<'v>(object: &'v Map<String, Value>, name: &str) -> &'v Value {
    object.get(name).unwrap_or(&Value::Null)
}

fn refuse<T>(what: String) -> Result<T> {
    Err(Error::Config(what))
}

fn vocab_of(
    top: &Map<String, Value>,
    model: Model,
    alphabet: &Alphabet,
    specials: Option<&SpecialNames>,
    pattern: Option<&str>,
) -> Result<Vocab> {
    refuse_what_is_more(top, &model.fields)?;
    let own_pattern = pattern_of(field(top, "pre_tokenizer"))?;
    let mut added = added_tokens(field(top, "added_tokens"))?;
    let Some(tokens) = model.tokens else {
        return refuse("model.vocab is missing; expected an object of tokens and ids".into());
    };
    let mut listed = Listed::new(tokens.bytes, tokens.ids)?;
    let ids: HashMap<&str, TokenId, FixedState> = added.iter().map(|(text, id)| (text.as_str(), *id)).collect();
    // Special tokens may stand among the others; the vocabulary's id is the one that Hugging Face's library takes.
    let same = |text: &str, id: TokenId, own: TokenId| {
        if id == own {
            return Ok(());
        }
        refuse(format!("added token {text:?}: found id {own}; expected {id}, as model.vocab has it"))
    };
    let mut seen = HashMap::<_, _, FixedState>::default();
    for (text, id) in &tokens.raw {
        match ids.get(text.as_str()) {
            Some(&own) => same(text, *id, own)?,
            None => return refuse(format!("token {text:?} is not byte-level; expected GPT-2's byte alphabet")),
        }
        if seen.insert(text, id).is_some() {
            return refuse(format!("model.vocab: token {text:?} is there twice; expected each once"));
        }
    }
    for (text, own) in &added {
        if let Some(place) = alphabet.bytes(text).and_then(|bytes| listed.find(&bytes)) {
            same(text, listed.id(place), *own)?;
            listed.remove(place);
        }
    }
    let Some(halves) = model.halves else {
        return refuse("model.merges is missing; expected a list of pairs".into());
    };
    if let Some((rank, what)) = halves.odd {
        return refuse(format!("merge {rank}: found {what}; expected two tokens in GPT-2's byte alphabet"));
    }
    let rules = rules(&halves.bytes, &listed, |_| ())?;
    added = add_specials(&listed, added, specials)?;
    let ignore_merges = *field(&model.fields, "ignore_merges") == true;
    Vocab::from_listed(listed, rules, added, pattern.unwrap_or(&own_pattern), ignore_merges)
}

/// What the format can say and this core cannot do.
fn refuse_what_is_more(top: &Map<String, Value>, model: &Map<String, Value>) -> Result<()> {
    let kind = field(model, "type");
    if !(kind.is_null() || kind == "BPE") {
        return refuse(format!("model type {kind}; expected \"BPE\", byte-level"));
    }
    for name in ["truncation", "padding"] {
        if !field(top, name).is_null() {
            return refuse(format!("{name} is set; expected null"));
        }
    }
    for name in ["dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"] {
        let found = field(model, name);
        if !(found.is_null() || found.as_str() == Some("") || found.as_f64() == Some(0.0)) {
            return refuse(format!("model.{name} is {found}; expected null"));
        }
    }
    if *field(model, "byte_fallback") == true {
        return refuse("model.byte_fallback is true; expected a byte-level model".into());
    }
    let normalizer = field(top, "normalizer");
    if !normalizer.is_null() {
        return refuse(format!("normalizer {}; expected null: text is taken as it is", normalizer["type"]));
    }
    let post = field(top, "post_processor");
    // transformers writes a template that adds nothing to a text.
    let sequences =
        post["single"].as_array().is_some_and(|parts| parts.iter().all(|part| part["Sequence"].is_object()));
    let adds_nothing = post["type"] == "TemplateProcessing" && sequences;
    if !(post.is_null() || post["type"] == "ByteLevel" || adds_nothing) {
        return refuse(format!(
            "post_processor {}; expected null, \"ByteLevel\" or a template that adds no token",
            post["type"]
        ));
    }
    Ok(())
}

fn added_tokens(list: &Value) -> Result<Vec<(String, TokenId)>> {
    if !(list.is_null() || list.is_array()) {
        return refuse("added_tokens is no list; expected one".into());
    }
    let mut added = Vec::new();
    for token in list.as_array().into_iter().flatten() {
        let id = token["id"].as_u64().and_then(|id| TokenId::try_from(id).ok());
        let (Some(text), Some(id)) = (token["content"].as_str(), id) else {
            return refuse(format!("added token {token}; expected a content and an id"));
        };
        for name in ["single_word", "lstrip", "rstrip"] {
            if token[name] == true {
                return refuse(format!("added token {text:?} has {name}; expected false"));
            }
        }
        added.push((text.to_string(), id));
    }
    Ok(added)
}

/// The pattern of a `pre_tokenizer`: `ByteLevel` alone, or `Split` by a regular expression before it.
fn pattern_of(pre: &Value) -> Result<String> {
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
    refuse(format!(
        "pre_tokenizer {}; expected \"ByteLevel\" without a prefix space, alone or behind an isolated \"Split\" by a regular expression",
        pre["type"]
    ))
}
