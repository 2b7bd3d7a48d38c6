//! Training that goes on from a tokenizer: its merges as the trainer numbers them, and the tokenizer with more tokens.
//!
//! In: a [`Vocab`], later what was learnt behind it. Out: a [`Prior`], later a larger [`Vocab`]. Called by `trainer`.

use crate::error::{Error, Result};
use crate::prior::{Prior, show};
use crate::train::{Merges, TokenId};
use crate::vocab::{Merge, Vocab};

const NONE: TokenId = TokenId::MAX;

/// A tokenizer's merges: bytes are 0–255, merges follow in their order, whatever ids the tokenizer gives them.
///
/// # Errors
/// [`Error::Config`] for a token that is neither a byte nor a merge's result, for an id that is free (new tokens behind it
/// would make it a hole), and for merges that training could not have found ([`Prior::new`]).
pub fn prior_of(vocab: &Vocab) -> Result<Prior> {
    let whole = |error: Error| match error {
        Error::Config(what) => Error::Config(format!("the tokenizer to extend: {what}")),
        other => other,
    };
    if let Some(id) = (0..vocab.len() as TokenId).find(|&id| vocab.token(id).is_none()) {
        return Err(whole(Error::Config(format!("no token has id {id}; expected ids without a hole"))));
    }
    let mut ours = vec![NONE; vocab.len()];
    for (byte, &id) in (0..).zip(vocab.byte_ids()) {
        ours[id as usize] = byte;
    }
    let mut pairs = Vec::with_capacity(vocab.merges().len());
    for (next, merge) in (256..).zip(vocab.merges()) {
        let (a, b) = merge.pair;
        pairs.push((ours[a as usize], ours[b as usize]));
        if ours[merge.id as usize] == NONE {
            ours[merge.id as usize] = next;
        }
    }
    let prior = Prior::new(pairs).map_err(whole)?;
    let unmade = |&(id, &our): &(TokenId, &TokenId)| our == NONE && !vocab.is_special(id);
    if let Some((id, _)) = (0..).zip(&ours).find(unmade) {
        let token = show(vocab.token(id).unwrap_or_default());
        let what = format!("token {id} ({token}) is neither a byte nor made by a merge; expected tokens of merges");
        return Err(whole(Error::Config(what)));
    }
    Ok(prior)
}

/// `old` with the merges that were learnt behind its own. Its tokens keep their ids, special ones too; new ones follow.
pub fn extended(old: &Vocab, merges: &Merges) -> Result<Vocab> {
    let known = old.merges().len();
    let (mut ids, mut rules) = (old.byte_ids().to_vec(), old.merges().to_vec());
    ids.extend(rules.iter().map(|merge| merge.id));
    let tokens = (0..old.len() as TokenId).filter(|&id| !old.is_special(id));
    let mut tokens: Vec<(Vec<u8>, TokenId)> =
        tokens.map(|id| (old.token(id).unwrap_or_default().to_vec(), id)).collect();
    let first_rank = rules.last().map_or(0, |merge| merge.rank + 1);
    let news = merges.pairs.iter().zip(merges.tokens.iter().skip(256)).skip(known);
    for ((rank, id), (&(a, b), bytes)) in (first_rank..).zip(old.len() as TokenId..).zip(news) {
        rules.push(Merge { pair: (ids[a as usize], ids[b as usize]), id, rank });
        ids.push(id);
        tokens.push((bytes.to_vec(), id));
    }
    Vocab::new(&tokens, rules, old.specials().to_vec(), old.pattern(), old.ignore_merges())
}
