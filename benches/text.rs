//! Text for the benches, made from nothing.

#![allow(missing_docs, reason = "a bench")]

/// Numbers of 64 bits, always the same ones.
pub fn random() -> impl FnMut() -> u64 {
    let mut state = 0x2545_f491_4f6c_dd1du64;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    }
}

/// Words drawn from a Zipf-like distribution, so that tables see what they see on real text.
pub fn prose(bytes: usize) -> String {
    let mut next = random();
    let words: Vec<String> = (0..20_000u32)
        .map(|_| (0..2 + next() % 9).map(|_| char::from(b"etaoinshrdlucmfw"[(next() % 16) as usize])).collect())
        .collect();
    let mut text = String::with_capacity(bytes + 16);
    while text.len() < bytes {
        // A uniform number of bits, then a uniform rank of so many bits: rank r comes about 1/r of the time.
        let rank = next() >> (50 + next() % 14);
        text += &words[rank as usize % words.len()];
        text += if next().is_multiple_of(12) { ".\n" } else { " " };
    }
    text
}
