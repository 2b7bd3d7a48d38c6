//! Where tokens lie in their text, in bytes and in characters.
//!
//! In: a text and its ids. Out: [`Offsets`]. Called by the binding.
//!
//! Encoding loses nothing: the bytes of the ids, special tokens' as their text, are the text's, in order. So a token's
//! bytes lie behind those of all tokens before it, and no encoder has to keep places.

use crate::error::{Error, Result};
use crate::train::TokenId;
use crate::vocab::Vocab;

/// Start and end of every token; the end is the first place behind it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Offsets {
    /// Bytes of UTF-8. Tokens follow each other without a gap.
    pub bytes: Vec<[u64; 2]>,
    /// The characters in which the token's bytes lie, whole or in part: tokens that share a character overlap.
    pub characters: Vec<[u64; 2]>,
}

/// The places of `ids` in `text`, which they encode.
///
/// # Errors
/// [`Error::Config`] where the ids are those of another text.
pub fn offsets(vocab: &Vocab, text: &str, ids: &[TokenId]) -> Result<Offsets> {
    let mut found = Offsets { bytes: Vec::with_capacity(ids.len()), characters: Vec::with_capacity(ids.len()) };
    // Characters that begin before `at`.
    let (mut at, mut begun) = (0, 0);
    for (place, &id) in ids.iter().enumerate() {
        let token = vocab.token(id).unwrap_or_default();
        if token.is_empty() || !text.as_bytes()[at..].starts_with(token) {
            let what = format!("ids[{place}]: found {id} at byte {at} of the text; expected the ids of this text");
            return Err(Error::Config(what));
        }
        let first = begun - u64::from(!text.is_char_boundary(at));
        begun += token.iter().filter(|&&byte| byte & 0xc0 != 0x80).count() as u64;
        let end = at + token.len();
        found.bytes.push([at as u64, end as u64]);
        found.characters.push([first, begun]);
        at = end;
    }
    Ok(found)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test ends where something fails")]
mod tests {
    use super::*;

    #[test]
    fn parts_of_characters_are_in_their_characters() {
        // A byte a token, but for "\u{97}a": the last byte of U+65E5 before an a lies in two characters.
        let mut tokens: Vec<_> = (0..=255u8).map(|byte| vec![byte]).zip(0..).collect();
        tokens.push((vec![0xa5, b'a'], 256));
        let vocab = Vocab::new(&tokens, vec![], vec![("<|e|>".into(), 257)], "gpt2", false).unwrap();
        let text = "é日a<|e|>b";
        let ids = [0xc3, 0xa9, 0xe6, 0x97, 256, 257, 0x62];
        let found = offsets(&vocab, text, &ids).unwrap();
        assert_eq!(found.bytes, [[0, 1], [1, 2], [2, 3], [3, 4], [4, 6], [6, 11], [11, 12]]);
        assert_eq!(found.characters, [[0, 1], [0, 1], [1, 2], [1, 2], [1, 3], [3, 8], [8, 9]]);
        assert!(offsets(&vocab, "x", &ids).unwrap_err().to_string().contains("ids[0]: found 195 at byte 0"));
    }
}
