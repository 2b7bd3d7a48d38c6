//! GPT-2's printable stand-ins for bytes, both ways: tokenizer files spell tokens with them.
//!
//! Called by `vocab` and `formats`.

use crate::train::byte_alphabet;

/// The stand-ins lie below this code point.
const CODES: usize = 0x144;
const NONE: u16 = u16::MAX;

/// Bytes and characters, one for one.
pub(crate) struct Alphabet {
    chars: [char; 256],
    /// Byte by code point: a vocabulary has hundreds of thousands of characters, so no hashing here.
    bytes: [u16; CODES],
}

impl Alphabet {
    pub fn new() -> Self {
        let chars = byte_alphabet();
        let mut bytes = [NONE; CODES];
        for (byte, &c) in (0u16..).zip(&chars) {
            bytes[c as usize] = byte;
        }
        Self { chars, bytes }
    }

    /// The characters by byte.
    pub fn chars(&self) -> &[char; 256] {
        &self.chars
    }

    /// The byte that a character stands for.
    pub fn byte(&self, c: char) -> Option<u8> {
        let byte = *self.bytes.get(c as usize)?;
        (byte != NONE).then_some(byte as u8)
    }

    /// The spelling of bytes.
    pub fn text(&self, bytes: &[u8]) -> String {
        bytes.iter().map(|&b| self.chars[b as usize]).collect()
    }

    /// Appends the bytes that `text` spells; false, and nothing, where a character stands for none.
    pub fn spell(&self, text: &str, out: &mut Vec<u8>) -> bool {
        let begin = out.len();
        let complete = text.chars().all(|c| self.byte(c).map(|byte| out.push(byte)).is_some());
        if !complete {
            out.truncate(begin);
        }
        complete
    }

    /// The same as bytes of their own.
    pub fn bytes(&self, text: &str) -> Option<Vec<u8>> {
        let mut bytes = Vec::with_capacity(text.len());
        self.spell(text, &mut bytes).then_some(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_a_character_and_no_other_has_a_byte() {
        let alphabet = Alphabet::new();
        let every: Vec<u8> = (0..=255).collect();
        assert_eq!(alphabet.bytes(&alphabet.text(&every)), Some(every));
        let meant = ('\0'..=char::MAX).filter(|&c| alphabet.byte(c).is_some()).count();
        assert_eq!(meant, 256);
        let mut out = b"kept".to_vec();
        assert!(!alphabet.spell("Ġa b", &mut out) && out == b"kept");
    }
}
