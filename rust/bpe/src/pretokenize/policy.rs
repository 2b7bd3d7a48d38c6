//! Bytes that are not UTF-8: what is done with them, and how they are told.

use crate::error::{Error, Result};

/// What to do with bytes that are not UTF-8.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TextPolicy {
    /// Refuse, naming the byte offset.
    #[default]
    Error,
    /// Put U+FFFD in place of each maximal invalid sequence.
    Replace,
    /// Keep the bytes; pre-token borders fall where they would if each invalid byte were U+FFFD.
    Bytes,
}

impl TextPolicy {
    /// The policy of a name: `error`, `replace` or `bytes`.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "error" => Ok(Self::Error),
            "replace" => Ok(Self::Replace),
            "bytes" => Ok(Self::Bytes),
            _ => Err(Error::Config(format!("errors: found {name:?}; expected error, replace or bytes"))),
        }
    }

    /// The policy's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Replace => "replace",
            Self::Bytes => "bytes",
        }
    }
}

/// Offset of the first byte that is not part of valid UTF-8.
pub fn first_invalid(bytes: &[u8]) -> Option<usize> {
    simdutf8::compat::from_utf8(bytes).err().map(|e| e.valid_up_to())
}

/// Bytes as the text that they are.
///
/// # Errors
/// [`Error::Text`] with the offset of the first that is not part of UTF-8.
pub fn valid_text(bytes: &[u8]) -> Result<&str> {
    simdutf8::basic::from_utf8(bytes).map_err(|_| {
        let at = first_invalid(bytes).unwrap_or(0);
        Error::Text(format!("byte offset {at}: {}", describe_invalid(bytes, at, None)))
    })
}

/// What stands at an invalid place, and the ways out.
pub fn describe_invalid(bytes: &[u8], at: usize, line: Option<u64>) -> String {
    let line = line.map_or(String::new(), |line| format!(" in line {line}"));
    format!(
        "invalid UTF-8 (byte 0x{:02x}){line}; expected UTF-8 text, or choose errors=\"replace\" or \"bytes\" (--errors)",
        bytes[at]
    )
}

/// Where the borders of a stand-in text lie in the bytes that it stands for.
pub(super) struct Origin {
    /// (offset in the stand-in, offset in the original) after each invalid byte, ascending.
    steps: Vec<(usize, usize)>,
}

impl Origin {
    pub(super) fn of(&self, at: usize) -> usize {
        let step = self.steps.partition_point(|&(stand_in, _)| stand_in <= at);
        let (stand_in, original) = if step == 0 { (0, 0) } else { self.steps[step - 1] };
        original + (at - stand_in)
    }
}

/// A text in which U+FFFD stands for each invalid byte.
pub(super) fn replace_invalid_bytes(bytes: &[u8]) -> (String, Origin) {
    let (mut text, mut steps, mut original) = (String::new(), Vec::new(), 0);
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        original += chunk.valid().len();
        for _ in chunk.invalid() {
            text.push(char::REPLACEMENT_CHARACTER);
            original += 1;
            steps.push((text.len(), original));
        }
    }
    (text, Origin { steps })
}
