//! GPT-2's printable stand-ins for bytes, both ways: tokenizer files spell tokens with them.
//!
//! Called by `vocab` and `formats`.

use crate::train::byte_alphabet;

/// The stand-ins lie below this code point.
const CODES: usize = 0x144;
const NONE: u16 = u16::MAX;
/// The stand-in of the blank.
const BLANK: &[u8] = "Ġ".as_bytes();

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
        out.reserve(text.len());
        let mut rest = text.as_bytes();
        // What is printable ASCII stands for itself: nearly all of nearly every token, but a blank in front.
        if let Some(behind) = rest.strip_prefix(BLANK) {
            out.push(b' ');
            rest = behind;
        }
        let plain = rest.iter().take_while(|byte| byte.is_ascii_graphic()).count();
        let (plain, mut rest) = rest.split_at(plain);
        out.extend_from_slice(plain);
        // All characters of the alphabet have one byte of UTF-8 or two.
        while let Some((&first, behind)) = rest.split_first() {
            let (code, behind) = match behind.split_first() {
                Some((&second, behind)) if first & 0xe0 == 0xc0 => {
                    (usize::from(first & 0x1f) << 6 | usize::from(second & 0x3f), behind)
                }
                _ => (usize::from(first), behind),
            };
            // The first byte of a longer character is above 0xdf, where characters of two bytes have their codes.
            let byte = if first < 0xe0 { self.bytes.get(code).copied().unwrap_or(NONE) } else { NONE };
            if byte == NONE {
                out.truncate(begin);
                return false;
            }
            out.push(byte as u8);
            rest = behind;
        }
        true
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
        for odd in ["Ġa b", "日", "Ġ\u{e0}\u{144}", "\u{7f}", "\u{ad}", "😀"] {
            assert!(!alphabet.spell(odd, &mut out) && out == b"kept", "{odd}");
        }
        for c in '\0'..=char::MAX {
            assert_eq!(alphabet.bytes(&c.to_string()), alphabet.byte(c).map(|byte| vec![byte]));
        }
    }
}
