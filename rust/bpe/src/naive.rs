//! The specification: BPE as one would write it on a page, slow and readable. The fast code is held to it by
//! property tests (`tests/rust/`), for ever. Nothing here is meant to be used on more than a few kilobytes.

use std::collections::BTreeMap;

use crate::train::{Merges, Options, Pair, TieBreak, TokenId, byte_alphabet};
use crate::vocab::Vocab;

/// Learns merges: do the prior ones, then count every pair of neighbours anew, merge the most frequent one everywhere,
/// repeat. Words rarer than `min_frequency` are left out, pairs that are rarer or too long are never merged.
pub fn train(words: &[(Vec<u8>, u64)], options: &Options) -> Merges {
    let mut tokens: Vec<Vec<u8>> = (0..=255).map(|b| vec![b]).collect();
    let (mut pairs, mut met, mut ties) = (Vec::new(), Vec::new(), 0);
    let mut words: Vec<(Vec<TokenId>, u64)> = words
        .iter()
        .filter(|(_, count)| *count >= options.min_frequency)
        .map(|(word, count)| (word.iter().map(|&b| b.into()).collect(), *count))
        .collect();
    let mut merge = |words: &mut Vec<(Vec<TokenId>, u64)>, tokens: &mut Vec<Vec<u8>>, pair: Pair| {
        let joined = [tokens[pair.0 as usize].clone(), tokens[pair.1 as usize].clone()].concat();
        // Tokens are their bytes: a second way to the same bytes is the same token.
        let id = tokens.iter().position(|t| *t == joined).unwrap_or(tokens.len());
        if id == tokens.len() {
            tokens.push(joined);
        }
        pairs.push(pair);
        for (word, _) in words {
            *word = replace(word, pair, id as TokenId);
        }
        pairs.len()
    };
    let mut done = 0;
    for &pair in options.prior.pairs() {
        done = merge(&mut words, &mut tokens, pair);
    }
    while done < options.merges {
        let mut counts: BTreeMap<Pair, u64> = BTreeMap::new();
        for (word, count) in &words {
            for pair in word.windows(2) {
                *counts.entry((pair[0], pair[1])).or_default() += count;
            }
        }
        counts.retain(|pair, count| {
            let len = tokens[pair.0 as usize].len() + tokens[pair.1 as usize].len();
            *count >= options.min_frequency.max(1) && len <= options.max_token_length
        });
        let best = counts.iter().max_by(|a, b| {
            a.1.cmp(b.1).then_with(|| match options.rule {
                TieBreak::Lexicographic => {
                    let bytes = |p: &Pair| (tokens[p.0 as usize].clone(), tokens[p.1 as usize].clone());
                    bytes(a.0).cmp(&bytes(b.0))
                }
                TieBreak::HuggingFace => {
                    let number = |p: &Pair| (alphabetical(p.0), alphabetical(p.1));
                    number(b.0).cmp(&number(a.0))
                }
                TieBreak::RawBytes => b.0.cmp(a.0),
            })
        });
        let Some((&pair, &count)) = best else { break };
        met.push(count);
        ties += u64::from(counts.values().filter(|&&other| other == count).count() > 1);
        done = merge(&mut words, &mut tokens, pair);
    }
    Merges { pairs, tokens: tokens.into_iter().collect(), counts: met, ties }
}

/// Hugging Face's numbering: single bytes in the order of their printable characters, then merges.
fn alphabetical(id: TokenId) -> u32 {
    let alphabet = byte_alphabet();
    match alphabet.get(id as usize) {
        Some(own) => alphabet.iter().filter(|&c| c < own).count() as u32,
        None => id,
    }
}

fn replace(word: &[TokenId], pair: Pair, id: TokenId) -> Vec<TokenId> {
    let (mut out, mut at) = (Vec::new(), 0);
    while at < word.len() {
        if word[at..].starts_with(&[pair.0, pair.1]) {
            out.push(id);
            at += 2;
        } else {
            out.push(word[at]);
            at += 1;
        }
    }
    out
}

/// Encodes one pre-token: join the leftmost pair of the smallest rank until no pair merges.
pub fn encode(vocab: &Vocab, word: &[u8]) -> Vec<TokenId> {
    if vocab.ignore_merges()
        && let Some(id) = vocab.id_of(word)
    {
        return vec![id];
    }
    let mut ids: Vec<TokenId> = word.iter().map(|&b| vocab.byte_ids()[b as usize]).collect();
    loop {
        let mergeable = |w: &[TokenId]| vocab.merges().iter().find(|m| m.pair == (w[0], w[1]));
        let found = ids.windows(2).enumerate().filter_map(|(at, w)| mergeable(w).map(|m| (m.rank, at, m.id)));
        let Some((_, at, id)) = found.min() else { return ids };
        ids.splice(at..at + 2, [id]);
    }
}

/// Decodes: the tokens' bytes joined, special ones left out if asked for; or the place of the first id that no token has.
pub fn decode(vocab: &Vocab, ids: &[TokenId], skip_special: bool) -> Result<Vec<u8>, usize> {
    let mut out = Vec::new();
    for (place, &id) in ids.iter().enumerate() {
        let token = vocab.token(id).ok_or(place)?;
        if !(skip_special && vocab.is_special(id)) {
            out.extend_from_slice(token);
        }
    }
    Ok(out)
}
